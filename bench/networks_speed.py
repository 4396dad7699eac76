"""Whole networks at rising sparsity, against the other engines, on one and two threads.

    python -m bench.networks_speed [--networks resnet50 bert] [--zeros 0 0.9] [--threads 1] [--json out.json]

Weights are random (the demo network's are trained): this is about speed. A share of the 1x4 blocks of each weight is
set to zero in the ONNX model. The other engines run the dense model, in float32 and int8, since they take as long for
the pruned one (``--peers-on-zeros 0.9`` shows it). All engines of one network and thread count take turns in one
process, and every output is compared with ONNX Runtime's float32 on the same weights before it is timed. Where
``--target`` is a GPU, they run on the GPU too (``--peers onnxruntime``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from bench.engines import Engine, peer_engine, pumice_engine, time_together
from bench.options import speed_options
from bench.processes import fresh_processes, write_runs
from bench.pruning import prune_blocks
from bench.subjects import SUBJECTS, Subject
from bench.tables import markdown, number
from pumice.errors import AccuracyBudgetError
from pumice.peers import OnnxRuntime, quantize_int8
from pumice.targets.target import Target

ZEROS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
MIN_SNR_DB = 6.0  # of Pumice against float32 on the same weights: a wrong kernel gives 0 or less
_CALIBRATION_SAMPLES = 4

Entry = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    network: str
    threads: int
    zeros: tuple[float, ...]
    peers: tuple[str, ...]
    peers_on_zeros: tuple[float, ...]
    target: str
    seconds: float


@dataclass
class Contender:
    """An engine with one form of the network. ``family`` is pumice or a name in ``PEERS``."""

    engine: Engine
    family: str
    dtype: str
    zeros: float
    snr_db: float = 0.0


def measure_network(job: Job, model: bytes) -> Entry:
    """Every engine of one network on one thread count, as an entry of the JSON's ``runs``."""
    subject = SUBJECTS[job.network]
    sample = subject.feed(1)
    contenders = []
    with TemporaryDirectory(prefix="pumice-") as folder:
        for zeros in sorted({0.0, *job.zeros, *job.peers_on_zeros}):
            pruned = prune_blocks(onnx.load_from_string(model), zeros, subject.pointwise_only)
            path = Path(folder, f"{1000 * zeros:.0f}.onnx")
            onnx.save(pruned, path)
            (exact,) = OnnxRuntime(path.read_bytes(), job.threads).run(sample).values()
            for contender in _contenders(job, subject, path, zeros):
                contender.snr_db = signal_to_noise(exact, contender.engine.run(sample))
                _check(contender, subject)
                contenders.append(contender)
                _say(f"{subject.title}, {job.threads} thread(s): {contender.engine.name} is ready")
        time_together([contender.engine for contender in contenders], sample, job.seconds)
    return {"network": subject.title, "threads": job.threads, "engines": entries(contenders)}


def _contenders(job: Job, subject: Subject, path: Path, zeros: float) -> Iterator[Contender]:
    calibration = subject.feed(_CALIBRATION_SAMPLES)
    label = f"int8, {zeros:.0%} zero" if zeros else "int8"
    if job.peers and zeros in (0.0, *job.peers_on_zeros):
        content, on_gpu = path.read_bytes(), Target.parse(job.target).runs_on_gpu
        quantized = quantize_int8(content, calibration, subject.quantized_operators, on_gpu)
        for peer in job.peers:
            if not zeros:
                yield Contender(peer_engine(peer, content, "float32", job.threads, on_gpu), peer, "float32", zeros)
            yield Contender(peer_engine(peer, quantized, label, job.threads, on_gpu), peer, "int8", zeros)
    if zeros in job.zeros:
        # Equalizing and bias correction take time to compile, and no matter for speed.
        how: dict[str, Any] = {
            "calibration": calibration,
            "equalize": False,
            "correct_bias": False,
            "measure_errors": False,
        }
        yield Contender(pumice_engine(path, label, job.target, job.threads, **how), "pumice", "int8", zeros)


def _check(contender: Contender, subject: Subject) -> None:
    if contender.family == "pumice" and not contender.snr_db >= MIN_SNR_DB:
        raise AccuracyBudgetError(
            f"{subject.title}: {contender.engine.name} is at {contender.snr_db:.1f} dB against float32 on the same "
            f"weights, below {MIN_SNR_DB:g}: it computes something else and is not timed"
        )


def signal_to_noise(exact: np.ndarray, values: np.ndarray) -> float:
    """In decibels, from -120, for what is not finite, to 120, for what is equal."""
    if not np.isfinite(values).all():
        return -120.0
    noise = float(np.square(values.astype(np.float64) - exact).sum())
    return min(120.0, 10 * float(np.log10(np.square(exact.astype(np.float64)).sum() / max(noise, 1e-300))))


def entries(contenders: Sequence[Contender]) -> list[Entry]:
    """For each contender its times, and how many times as fast it is as the best dense int8 peer of the same run."""
    ratios = {id(c): c.engine.timing.ratio for c in contenders if c.engine.timing}
    rivals = [c for c in contenders if c.family != "pumice" and c.dtype == "int8" and not c.zeros]
    best = min((ratios[id(c)] for c in rivals), default=None)
    return [
        {
            **c.engine.to_json(),
            "family": c.family,
            "dtype": c.dtype,
            "zeros": c.zeros,
            "snr_db": round(c.snr_db, 2),
            "is_best_peer": c in rivals and ratios[id(c)] == best,
            "speedup": None if best is None else best / ratios[id(c)],
        }
        for c in contenders
    ]


def details(run: Entry) -> str:
    """The table of one run."""
    rows = [["engine", "ms", "p10", "p90", "times the best dense int8 peer", "SNR dB", "MB", "compile s"]]
    for e in run["engines"]:
        times = [number(e[key], 3) for key in ("median_ms", "p10_ms", "p90_ms")]
        rest = [number(e["megabytes"], 1), number(e["compile_seconds"], 1)]
        rows.append([e["name"], *times, number(e["speedup"], 2), number(e["snr_db"], 1), *rest])
    return f"{run['network']}, {run['threads']} thread(s)\n\n{markdown(rows)}\n"


def summary(runs: Sequence[Entry]) -> str:
    """One line a run: the best dense int8 peer, and how many times as fast Pumice is at each share of zeros."""
    shares = sorted({e["zeros"] for run in runs for e in run["engines"] if e["family"] == "pumice"})
    rows = [["network", "threads", "best dense int8 peer", "ms", *(f"{zeros:.0%} zero" for zeros in shares)]]
    for run in runs:
        best = next((e for e in run["engines"] if e["is_best_peer"]), None)
        speedups = {e["zeros"]: e["speedup"] for e in run["engines"] if e["family"] == "pumice"}
        peer = [best["name"], number(best["median_ms"], 3)] if best else ["", ""]
        rows.append([run["network"], str(run["threads"]), *peer, *(number(speedups.get(zeros), 2) for zeros in shares)])
    return markdown(rows)


def scaling(runs: Sequence[Entry]) -> str:
    """How many times as fast Pumice is on the most threads as on one; empty where only one count was measured."""
    times = {
        (run["network"], e["zeros"], run["threads"]): e["median_ms"]
        for run in runs
        for e in run["engines"]
        if e["family"] == "pumice"
    }
    most = max((threads for _, _, threads in times), default=1)
    rows = [["network", "zeros", f"1 -> {most} threads"]]
    for (name, zeros, threads), milliseconds in times.items():
        if threads == most > 1 and (name, zeros, 1) in times:
            rows.append([name, f"{zeros:.0%}", number(times[name, zeros, 1] / milliseconds, 2)])
    return markdown(rows) if len(rows) > 1 else ""


def main() -> None:
    """Measure each network on each thread count in a process of its own."""
    parser = speed_options(__doc__, ZEROS, threads=[1, 2], seconds=30, json="out/bench/networks.json")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--peers-on-zeros", nargs="+", type=float, default=[], metavar="SHARE")
    options = parser.parse_args()
    runs: list[Entry] = []
    with fresh_processes() as call:
        for network in options.networks:
            model = call(_export, network)
            for threads in options.threads:
                job = Job(
                    network=network,
                    threads=threads,
                    zeros=tuple(options.zeros),
                    peers=tuple(options.peers),
                    peers_on_zeros=tuple(options.peers_on_zeros),
                    target=options.target,
                    seconds=options.seconds,
                )
                runs.append(call(measure_network, job, model))
                print(details(runs[-1]), flush=True)
                write_runs(options.json, "networks", runs)
    print("\n\n".join(part for part in (summary(runs), scaling(runs)) if part))


def _export(network: str) -> bytes:
    return bytes(SUBJECTS[network].model().SerializeToString())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
