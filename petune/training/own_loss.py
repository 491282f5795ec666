"""Models that compute the loss of their tokens themselves, as encoder-decoders do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from petune.core.method.batch import SKIP
from petune.training.logits import LabelledDecoder
from petune.training.swap import evaluating, forward_as

DECODED = {"decoder_input_ids", "decoder_inputs_embeds"}
"""What a call names that says itself what the decoder sees; else the labels tell."""


class OwnLoss(LabelledDecoder):
    """A model whose loss is the mean over its labelled tokens, computed inside its forward."""

    def __init__(self, model: Any, *more: Any) -> None:
        super().__init__(model, *more)
        self.forward: Callable[..., Any] = model.forward

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """What the model gives for a batch with labels, but its logits and its cache."""
        labels: Tensor = batch["labels"]
        call = {k: v for k, v in batch.items() if k not in ("labels", "use_cache")}
        if not call.keys() & DECODED:
            call["decoder_input_ids"] = self._decoder_ids(labels)
        with forward_as(self.decoder, self.run):
            out = self.forward(**call, use_cache=False)
        total, count = self.summed(self.out[0], labels)
        self.out = None
        told = {k: v for k, v in out.items() if k not in ("loss", "logits")}
        return type(out)(loss=total / count, **told)

    def _decoder_ids(self, labels: Tensor) -> Tensor:
        prepare = self.model.prepare_decoder_input_ids_from_labels
        ids: Tensor = prepare(labels=labels)
        return ids

    def head_inputs(self, ids: Tensor) -> dict[str, Any]:
        hidden = torch.zeros(1, 1, 1, device=ids.device)
        return {"decoder_input_ids": ids, "encoder_outputs": (hidden,)}


@torch.no_grad()
def own_loss(model: Any) -> OwnLoss | None:
    """The model as one that computes its loss itself, None if it does not, or not as a trial expects."""
    if not isinstance(model, PreTrainedModel) or not model.config.is_encoder_decoder:
        return None
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return None
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return None
    ids = torch.arange(2, 14, device=model.device).view(2, 6)
    labels = ids[:, :5].masked_fill(ids[:, :5] == 6, SKIP)
    batch = {"input_ids": ids, "attention_mask": ids.clamp(max=1), "labels": labels}
    with evaluating(model):
        try:
            plain = model.forward(**batch).loss
            found = OwnLoss(model, 2)
            ours = found(batch).loss
        except Exception:  # whatever a stranger's model says: it is left as it is
            return None
    same = torch.allclose(ours, plain, rtol=torch.finfo(plain.dtype).eps ** 0.5)
    return OwnLoss(model) if same else None
