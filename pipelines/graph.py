"""What all pipelines share: how a task is made from a component, and the shards of a teacher."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, List  # noqa: UP035 - kfp 2.17 reads only this form of a list of artifacts

from kfp import dsl

from avrt_lib.steps import STEPS
from pipelines.options import Options, config_parameter
from pipelines.placement import place


class Graph:
    """Makes the tasks of one pipeline.

    Args:
        options: the compile-time options.
        common: what every component takes: ``work``, ``data_hash`` and ``library_version``.
        images: the pipeline's parameters that hold the images' references, by image; they are part of the caches' keys.
    """

    def __init__(self, options: Options, common: Mapping[str, Any], images: Mapping[str, Any]) -> None:
        self.options = options
        self.common = dict(common)
        self.images = dict(images)

    def task(self, component: Callable[..., Any], name: str | None = None, **arguments: Any) -> Any:
        """A task of a component, in its image, on its pool, with what its step needs of the configuration.

        Args:
            component: of a step in ``avrt_lib.steps.STEPS``.
            name: shown instead of the component's.
            arguments: what this component takes beside the common arguments.
        """
        step = step_of(component)
        image = STEPS[step].image
        config = config_parameter(STEPS[step].part(self.options.config))
        task = component(**arguments, **self.common, config=config, image=self.images[image])
        task.set_container_image(getattr(self.options.images, image))
        if not STEPS[step].repeatable or (step == "ingest" and self.options.cluster and not self.options.data_hash):
            task.set_caching_options(False)
        if name:
            task.set_display_name(name)
        if self.options.cluster is not None:
            place(
                task,
                step,
                self.options.cluster,
                self.options.config,
                data_hash=self.options.data_hash,
                model=arguments.get("role", ""),
            )
        return task

    def summarised(self, component: Callable[..., Any], components: Sequence[str]) -> AbstractContextManager[Any]:
        """A block whose end, however it comes, is followed by the run's summary; only on a cluster.

        On one machine the process that started the run writes the summary.

        Args:
            component: ``run_summary``.
            components: what the pipeline is made of.
        """
        if self.options.cluster is None:
            return nullcontext()
        handler: AbstractContextManager[Any] = dsl.ExitHandler(
            self.task(component, components=",".join(components)), name="run"
        )
        return handler


def sharded(component: Callable[..., Any], options: Options) -> Any:
    """A nested pipeline that runs a teacher's shards side by side and hands on their traces as one list.

    The loop is inside a nested pipeline, over a static list: with a loop at the top the local runner confuses the
    outputs of other tasks with the loop's item, and both runners refuse ``Collected`` over an empty loop.

    Args:
        component: ``vision_teacher`` or ``audio_teacher``.
        options: the compile-time options.
    """

    @dsl.pipeline(name=f"{step_of(component).replace('_', '-')}-shards")
    def teacher(
        samples: dsl.Input[dsl.Dataset],
        library_version: str,
        data_hash: str,
        image: str,
        work: str,
    ) -> List[dsl.Dataset]:  # noqa: UP006
        common = {"work": work, "data_hash": data_hash, "library_version": library_version}
        graph = Graph(options, common, {STEPS[step_of(component)].image: image})
        teachers = options.config.teachers
        items = list(range(teachers.shards))
        with dsl.ParallelFor(items=items, parallelism=teachers.parallelism, name="shards") as shard:
            task = graph.task(component, samples=samples, shard=shard)
        return dsl.Collected(task.outputs["traces"])  # type: ignore[no-any-return]

    return teacher


def step_of(component: Callable[..., Any]) -> str:
    """The step that a component runs, which is its name."""
    return str(component.python_func.__name__)  # type: ignore[attr-defined]
