"""Checks before anything expensive starts."""

from kfp import dsl

from components.images import DEFAULT


@dsl.component(base_image=DEFAULT.pipeline, install_kfp_package=False)
def preflight(
    checks: dsl.Output[dsl.Artifact],
    components: str,
    config: str,
    library_version: str,
    data_hash: str,
    image: str,
    work: str = "",
) -> None:
    """Check that the run can succeed: packages, disk, memory, ports, sources and models of the configuration.

    A check that makes the run impossible fails the step, with what to do about it; the others are warnings.

    Args:
        checks: one JSON document with every check and its result.
        components: the components that the pipeline is made of, separated by commas.
        config: the run's configuration, or the step's part of it, as JSON text.
        library_version: the version of avrt that the pipeline was compiled with.
        data_hash: identity of the source data; part of the cache key.
        image: identity of the container image; part of the cache key.
        work: folder that survives a killed step; empty: none.
    """
    from avrt_lib.steps import run_step

    run_step(
        "preflight",
        config=config,
        inputs={},
        outputs={"checks": checks.path},
        work=work,
        params={"components": components},
        library_version=library_version,
    )
