"""Models that read token ids beside their embeddings, in a table that has none for virtual tokens."""

from torch import nn

import petune


def sites(model: nn.Module) -> list[petune.Site]:
    """Those that discovery finds but the prompt: DeepSeek V4 picks experts by a table of ids."""
    return [site for site in petune.discover(model) if site.kind != "prompt"]


ARCHITECTURES = dict.fromkeys(["deepseek_v4"], sites)
