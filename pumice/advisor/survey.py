"""The ground that a run of the advisor stands on, and the survey of it: every layer with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import tvm
from tvm.ir import IRModule

from pumice.advisor.end_to_end import Checker, Setting
from pumice.advisor.layer_options import LayerOption, LayerTable, layer_tables, measure_options
from pumice.advisor.sensitivities import Tell
from pumice.advisor.stitching import Stitcher
from pumice.advisor.subjects import Space, Subject, find_subjects
from pumice.advisor.work_file import WorkFile
from pumice.errors import UnsupportedError, UsageError
from pumice.module import source_of
from pumice.passes.calibrate import Calibrate
from pumice.passes.evaluate import Evaluator
from pumice.passes.prune_spec import PruneSpec
from pumice.passes.quantization_plan import QuantizeSpec
from pumice.passes.quantize import Quantize
from pumice.prepare import removing
from pumice.recipe import Recipe
from pumice.schedules.measurements import Machine, open_journal, read_measurements
from pumice.stages import Stages
from pumice.threads import check_threads


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    trials: choices that the search scores; minutes: of finding sensitivities, None for no limit; points: of the
    frontier; seconds: of measuring each kernel, a library takes ten times as long; processes: for layers' options
    """

    trials: int = 40
    minutes: float | None = None
    points: int = 5
    seconds: float = 0.2
    processes: int = 1

    def __post_init__(self) -> None:
        """Refuse what would find nothing."""
        for name in ("trials", "points", "processes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}: there must be at least one")


@dataclass(frozen=True, eq=False)
class Ground:
    """What one run stands on.

    ``mod`` is the simplified float model; ``exact`` runs it whole; ``note`` is on the samples. ``base`` is what every
    recipe has; of a ground without some filters or heads (``smaller``) it removes them.
    """

    mod: IRModule
    exact: Evaluator
    setting: Setting
    note: str
    checker: Checker
    work: WorkFile
    base: Recipe
    effort: Effort
    stage: Stages
    tell: Tell

    def smaller(self, removals: Sequence[PruneSpec]) -> Ground:
        """The ground without these filters and heads too. Raises what the passes do that remove them."""
        mod = self.mod
        for spec in removals:
            with self.stage(f"remove {spec}"):
                mod = tvm.transform.Sequential([removing(spec, self.setting.calibration)])(mod)
        return replace(self, mod=mod, base=self.base.but(prune=(*self.base.prune, *removals)))


@dataclass(frozen=True, eq=False)
class Layers:
    """The weights that may be changed, their options, why others may not, and what puts choices together."""

    subjects: list[Subject]
    tables: list[LayerTable]
    left: dict[str, str]
    stitcher: Stitcher


def find_layer_options(ground: Ground, space: Space, measure: bool) -> Layers:
    """The options of all layers: from the work file, or computed in processes, then measured."""
    setting, stage = ground.setting, ground.stage
    threads, target = check_threads(setting.threads), setting.target
    with stage(f"calibrate ({ground.base.calibration_method})"):
        spec = QuantizeSpec(keep_float=ground.base.keep_float)
        calibrate = Calibrate(setting.calibration, ground.base.calibration_method, spec)
        calibrated = tvm.transform.Sequential([calibrate])(ground.mod)
        quantized = tvm.transform.Sequential([Quantize(spec)])(calibrated)
    with stage("gather the moments of the layers' inputs"):
        subjects, left = find_subjects(ground.mod, quantized, setting.calibration, space, target, threads)
    if not subjects:
        raise UnsupportedError(f"{source_of(ground.mod)}: there is no layer that could be pruned: {_reasons(left)}")
    tables = _tables(ground, subjects, measure, threads)
    return Layers(subjects, tables, left, Stitcher(calibrated, subjects, tables, ground.base.keep_float))


def _tables(ground: Ground, subjects: list[Subject], measure: bool, threads: int) -> list[LayerTable]:
    target, path = ground.setting.target, ground.setting.tuning_db
    machine = Machine.of(target, threads)
    measured = read_measurements(path, machine) if path and not measure else None
    times = "" if measured is None else ground.setting.times_key

    def asked(subject: Subject) -> tuple[str, ...]:
        return ("options of a layer", subject.name, times, *map(str, (*ground.base.prune, *subject.specs)))

    def recorded(subject: Subject, compute: Callable[[], LayerTable]) -> LayerTable:
        stored = ground.work.remember(lambda: [option.to_json() for option in compute().options], *asked(subject))
        return LayerTable(subject.name, subject.layers, subject.weight, tuple(LayerOption(**one) for one in stored))

    new = [subject for subject in subjects if not ground.work.has(*asked(subject))]
    by_weight = {subject.weight: subject for subject in subjects}
    done = len(subjects) - len(new)

    def tell(table: LayerTable) -> None:
        nonlocal done
        recorded(by_weight[table.weight], lambda: table)
        done += 1
        ground.tell(f"{done}/{len(subjects)} {table.name}: {len(table.options)} options")

    with ground.stage("errors of the layers' options"):
        layer_tables(new, target, measured, ground.effort.processes, tell)
    tables = [recorded(subject, _never) for subject in subjects]
    if not measure:
        return tables
    assert path is not None
    found = []
    with ground.stage("times of the layers' options"), open_journal(path, machine) as journal:
        for subject, table in zip(subjects, tables, strict=True):
            found.append(measure_options(subject, table, journal, target, threads, ground.effort.seconds))
            ground.tell(f"{len(found)}/{len(tables)} {table.name}: times of {len(table.options)} options")
    return found


def _never() -> LayerTable:
    raise AssertionError("the options of every layer are known by now")


def _reasons(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in list(left.items())[:3]) or "it has no layers"
