"""Reports to look at: of the tiny network, with nothing measured or with times."""

from dataclasses import replace

import pytest

from pumice.report import Request, make_report


def silent(stage, seconds):
    pass


@pytest.fixture(scope="session")
def bare(library):
    """The report of a library that nothing is measured of."""
    return make_report(library, Request(), silent)


@pytest.fixture(scope="session")
def timed(library, samples):
    return make_report(library, Request(feed=lambda model: {"image": samples[:1]}, threads=1, seconds=0.02), silent)


@pytest.fixture
def with_layers(timed):
    """The timed report with its layers' records changed by a function."""

    def change(function):
        layers = [{**entry, **function(index, entry)} for index, entry in enumerate(timed.manifest["layers"])]
        renamed = {old["name"]: new["name"] for old, new in zip(timed.manifest["layers"], layers, strict=True)}
        steps = [replace(step, name=renamed.get(step.name, step.name)) for step in timed.profile.steps]
        manifest = {**timed.manifest, "layers": layers}
        return replace(timed, manifest=manifest, profile=replace(timed.profile, steps=steps))

    return change
