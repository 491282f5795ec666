"""Changes of the embedding table."""

from collections.abc import Mapping

import petune


@petune.hookimpl
def petune_methods() -> Mapping[str, type]:
    from petune_plugins.embedding.trainable_tokens import TrainableTokens

    return {"trainable-tokens": TrainableTokens}
