"""What models are tuned for."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_tasks() -> Mapping[str, type]:
    from petune_plugins.tasks.classification import Classification
    from petune_plugins.tasks.generation import Generation

    return {"classification": Classification, "generation": Generation}
