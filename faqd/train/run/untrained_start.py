"""What a student starts from that has its teacher's weights: the best of what needs no training, as `ptq` has it."""

from __future__ import annotations

from dataclasses import replace

from faqd.fidelity import KEPT
from faqd.quantize.student import Student
from faqd.quantize.without_training import JUDGED_IMAGES, Untrained, best_without_training
from faqd.train.data.datasets import Say
from faqd.train.loop.batches import Images
from faqd.train.loop.calibration_images import calibration_batches
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.recipes import has_a_choice_of_starts
from faqd.train.run.folder import RECORD, read_record
from faqd.train.run.prepared_student import PreparedStudent

SOMETHING = 0.01
"""The fidelity with which a student of less than 8/8 bits begins as it is. From less training has saved one detector of
three, and a text detector has a twentieth of its text by being equalized alone."""


def with_best_start(
    one: PreparedStudent, train: Images, select: Images, say: Say, processes: ProcessGroup
) -> PreparedStudent:
    """The student equalized, or asymmetric, where that is better, and its record with what was chosen, which a run that
    goes on keeps.

    With less than 8/8 bits only where the plain student keeps nothing.
    """
    recipe, out = one.plan.recipe, one.plan.out
    if not has_a_choice_of_starts(recipe):
        return one
    chosen = processes.from_rank_0(lambda: read_record(out).get("untrained") if (out / RECORD).is_file() else None)
    if chosen is None and recipe.equalize == "never" == recipe.asymmetric and recipe.calibration != "auto":
        return one
    best = best_without_training(
        one.student.float_network,
        one.student.config,
        [batch.cpu() for batch in calibration_batches(train)],
        select.normalised(select.pixels[:JUDGED_IMAGES]).cpu(),
        recipe.calibration if chosen is None else chosen["calibration"],
        recipe.equalize if chosen is None else ("always" if chosen["equalized_tensors"] else "never"),
        lambda tried: say(tried.in_words()),
        keep=_float_nodes(one.student, [ours for _, ours in one.pairs]),
        enough=KEPT if (recipe.weight_bits, recipe.act_bits) == (8, 8) else SOMETHING,
        asymmetric=recipe.asymmetric if chosen is None else ("always" if chosen["asymmetric"] else "never"),
    )
    record = {**one.plan.record, "untrained": _to_json(best)}
    plan = replace(one.plan, record=record)
    if best.equalized is None and best.student.config == one.student.config:
        return replace(one, plan=plan)
    floats = _float_nodes(one.student, [ours for _, ours in one.pairs])
    pairs = [(theirs, best.student.taps[name]) for (theirs, _), name in zip(one.pairs, floats, strict=True)]
    best.student.train()
    return replace(one, plan=plan, student=best.student, pairs=pairs)


def _float_nodes(student: Student, names: list[str]) -> list[str]:
    """The nodes of the float network whose values those of the student are."""
    back = {ours: theirs for theirs, ours in student.taps.items()}
    return [back[name] for name in names]


def _to_json(best: Untrained) -> dict[str, object]:
    """equalized: the places of products that the student has beside its network's own operators."""
    made = best.equalized
    return {
        "calibration": best.method,
        "equalized_tensors": 0 if made is None else len(made.tensors),
        "equalized": [] if made is None else list(made.products),
        "asymmetric": best.asymmetric,
    }
