"""PEFT's names of tasks, and what it does with the heads of a model by its task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from petune.errors import UnsupportedError
from petune.formats.advice import instead
from petune.formats.names import TASK_HEADS, outermost

if TYPE_CHECKING:
    from petune.core.attached.tuning import Tuning
    from petune.core.method.twin import PeftTwin

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""How the name of a model's class ends -> PEFT's name of the task."""
HEADS_BY_OPTION = ("TOKEN_CLS", "QUESTION_ANS")
"""The tasks whose heads PEFT finds by `modules_to_save`, and fails where a method has no such option."""


def task_of(tuning: Tuning, twin: PeftTwin) -> str | None:
    """PEFT's name of the model's task; None where PEFT would do with the head what is not done here.

    Raises:
        UnsupportedError: the head was trained along, and PEFT keeps none beside this method.
    """
    model = tuning.model
    cls = getattr(type(model), "petune_base", type(model)).__name__
    task = next((task for end, task in TASKS.items() if cls.endswith(end)), None)
    if twin.tables and task in HEADS_BY_OPTION:
        _check_no_heads(tuning, task)
        return None
    return None if _adapts_a_head(tuning, task) else task


def _check_no_heads(tuning: Tuning, task: str) -> None:
    if tuning.heads:
        raise UnsupportedError(
            f"PEFT keeps no head beside the rows of tokens of a {task} model; {instead(tuning.parts)}."
        )


def _adapts_a_head(tuning: Tuning, task: str | None) -> bool:
    """Whether a layer inside the head is adapted, which PEFT trains whole."""
    ends = TASK_HEADS.get(task or "")
    if not ends:
        return False
    names = [link.site.name for link in tuning.links if link.site.kind != "module"]
    return any(outermost(name, ends) for name in names)


def modules_to_save(tuning: Tuning, task: str | None) -> list[str] | None:
    """The modules that were trained whole, but for those inside a head that PEFT saves for this task anyway."""
    ends = TASK_HEADS.get(task or "")
    if not ends:
        return list(tuning.heads) or None
    around = {head: outermost(f"{head}.weight", ends) for head in tuning.heads}
    return [head for head in tuning.heads if around[head] in ("", head)] or None
