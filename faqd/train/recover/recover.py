"""What wins INT8 back without labels, the cheap before the dear, each step only where the ones before are not enough:

ptq: scales, equalization and what else needs no training.
keep-float: the same with a few layers and operators float, as few as do.
distilled: training with all in integers, which costs no speed.
distilled-float: training with what keep-float found, where it gained.

All are judged by one measure on the same images of the validation split, on which nothing is fitted. A step that does
not gain is not taken, and the bundle in the folder is at every moment that of the best so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from faqd.bundle import VERIFY, WORTH_INT8, Bundle, load_bundle
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.mixed_precision import places_in_words
from faqd.deploy.rehearsal import rehearse
from faqd.deploy.write_bundle import Calibration, QuantizedFloat, export_run, put_quantized, quantized_lesson
from faqd.errors import Paused
from faqd.files import read_json, write_json, written_beside
from faqd.quantize.capture.capture import capture
from faqd.quantize.int8_share import int8_share
from faqd.quantize.output_distance import OutputDistance
from faqd.quantize.without_training import Untrained
from faqd.train.data.datasets import Say
from faqd.train.distill import distill
from faqd.train.loop.batches import refuse_uneven
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.recipes import DistillRecipe
from faqd.train.recover.record import BUNDLE, RECORD, RUNS, Step, StepName, begun, best_of, steps_of
from faqd.train.recover.verdict import verdict_of
from faqd.train.run.folder import RECORD as RUN_RECORD
from faqd.train.run.folder import held
from faqd.train.run.lesson import Lesson, judged_images
from faqd.train.run.outcome import HARDLY, HARDLY_OF_ALL
from faqd.train.run.plan import plan_of
from faqd.train.run.student import load_student, recipe_bits

STEPS: tuple[StepName, ...] = ("ptq", "keep-float", "distilled", "distilled-float")
"""In this order. A search takes about the minutes that a training takes, and nothing can go wrong in it. Where what it
finds is not enough, training with all in integers comes first: whoever asks for INT8 wants that most."""
JUDGED = 128
"""Images of the validation split, at most, on which steps are compared."""


@dataclass(frozen=True)
class Recovery:
    """recipe: of the distillation, with the bits of all students. keep_float: so many places may be, at most. enough:
    the fidelity that ends the search."""

    lesson: Lesson
    recipe: DistillRecipe
    keep_float: int
    enough: float
    out: Path
    say: Say
    processes: ProcessGroup
    deadline: float

    def run(self) -> tuple[dict[str, Any], Bundle]:
        """The record and the bundle of the best. What an earlier process has finished is not done again."""
        plan = plan_of(self.recipe, self.out / RUNS["distilled"], self.lesson, None)
        refuse_uneven(plan.recipe.training, len(self.lesson.dataset.train), self.processes)
        asked = {**plan.record["asked"], "keep_float": self.keep_float, "enough": self.enough}
        self.out.mkdir(parents=True, exist_ok=True)
        with held(self.out):
            return self._goes_on(begun(self.out, asked))

    def _goes_on(self, record: dict[str, Any]) -> tuple[dict[str, Any], Bundle]:
        goes_on = False
        for name in STEPS:
            steps = steps_of(record)
            best = best_of(steps)
            if best is not None and best.fidelity >= self.enough:
                break
            if any(step.name == name for step in steps) or not self._has_a_use(name, steps):
                continue
            start = time.monotonic()
            if start >= self.deadline and goes_on:  # each piece makes one step at least, or an iteration of training
                raise Paused(
                    f"{self.out}: paused by --time-limit; {self.out / BUNDLE} is the best so far, and the same command "
                    "with --resume goes on."
                )
            try:
                step = self._made(name, steps)
            except Paused:
                spent = record.get("seconds_spent", 0.0) + time.monotonic() - start
                write_json(self.out / RECORD, {**record, "seconds_spent": spent})
                raise
            seconds = record.pop("seconds_spent", 0.0) + time.monotonic() - start
            record["steps"].append(replace(step, seconds=seconds).to_json())
            write_json(self.out / RECORD, record)
            goes_on = True
        bundle = load_bundle(self.out / BUNDLE)
        record["verdict"] = verdict_of(record, read_json(bundle.folder / VERIFY))
        write_json(self.out / RECORD, record)
        return record, bundle

    def _has_a_use(self, name: StepName, steps: list[Step]) -> bool:
        if name == "distilled-float":
            return any(step.name == "keep-float" and step.taken == "taken" for step in steps)
        return name != "keep-float" or self.keep_float > 0

    def _made(self, name: StepName, steps: list[Step]) -> Step:
        """The step, its bundle put in place where it is taken. steps: those before."""
        by_name = {step.name: step for step in steps}
        if name == "distilled":
            return self._distilled(name, by_name["ptq"], best_of(steps))
        if name == "distilled-float":
            return self._distilled(name, by_name["keep-float"], best_of(steps))
        return self._untrained(name, best_of(steps))

    def _untrained(self, name: StepName, best: Step | None) -> Step:
        """Quantized without training: `ptq` as it is, `keep-float` with a search for what stays float."""
        candidates: list[Step] = []
        before = time.monotonic()

        def tried(one: Untrained) -> None:
            nonlocal before
            now, share = time.monotonic(), int8_share(one.student)
            candidates.append(Step("ptq", one.made_in_words(), one.distance, share, now - before, "no better"))
            before = now

        most = self.keep_float if name == "keep-float" else 0
        how = Calibration(keep_float=most, enough=self.enough)
        self.say(f"step {name}: " + (f"at most {places_in_words(most)}." if most else "no training, nothing float."))
        made = quantized_lesson(self.lesson, recipe_bits(self.recipe), how, self.say, JUDGED, tried)
        step = self._step_of(name, made, candidates)
        return self._judged(step, best, lambda folder: put_quantized(made, folder, BundleOptions(), self.say))

    def _step_of(self, name: StepName, made: QuantizedFloat, candidates: list[Step]) -> Step:
        one, chosen = made.untrained, made.untrained.student.config.exclude[len(self.recipe.exclude) :]
        start = {
            "calibration": one.method,
            "equalize": "always" if one.equalized is not None else "never",
            "asymmetric": "always" if one.asymmetric else "never",
        }
        what = one.made_in_words()
        if name == "keep-float":
            tried = [trial for trial in made.trials if trial.exclude == "".join(chosen)]
            what = places_in_words(tried[0].floats) if chosen else "no place float helps"
        exclude, share = one.student.config.exclude, int8_share(one.student)
        few = tuple(candidates) if name == "ptq" else ()
        trials = tuple(map(dict, map(vars, made.trials)))
        return Step(name, what, one.distance, share, 0.0, "no better", exclude, start, few, trials)

    def _judged(self, step: Step, best: Step | None, write: Callable[[Path], Bundle]) -> Step:
        """The step with what becomes of it; one that is taken has its bundle put into the place of the one before."""
        if best is not None and step.distance >= best.distance:
            return step
        if best is not None and step.int8_share < best.int8_share and not self._is_worth_it(step, best):
            return replace(step, taken="not worth it")
        with written_beside(self.out / BUNDLE) as folder:
            write(folder)
        return replace(step, taken="taken")

    def _is_worth_it(self, step: Step, best: Step) -> bool:
        """What stays float costs speed: it is to gain what training must, to count as help, or all that was asked; and
        no more than leaves INT8 a use."""
        if step.int8_share < WORTH_INT8 <= best.int8_share:
            return False
        gain = best.distance - step.distance
        return step.fidelity >= self.enough or gain >= max(HARDLY * best.distance, HARDLY_OF_ALL)

    def _distilled(self, name: StepName, start: Step, best: Step | None) -> Step:
        """start: the step whose student is trained."""
        assert start.start is not None
        recipe = replace(self.recipe, exclude=start.exclude)
        if (recipe.weight_bits, recipe.act_bits) == (8, 8):
            # With fewer bits a student that keeps anything learns best from where it is, as distill itself decides.
            recipe = replace(recipe, **start.start)
        run, judge = self.out / RUNS[name], self._distance
        self.say(f"step {name}: training into {run}.")
        distill([(recipe, run)], self.lesson, None, True, self.say, self.processes, self.deadline, rehearse)
        kept, student = read_json(run / RUN_RECORD)["kept"], load_student(run)
        floats = ", what stays float as above" if name == "distilled-float" else ""
        what = f"distilled{floats}" if kept["iteration"] else f"distilled{floats}: training gave nothing"
        step = Step(name, what, judge.of(student.network), int8_share(student), 0.0, "no better", start.exclude)
        return self._judged(step, best, lambda folder: export_run(run, folder, BundleOptions(), self.say))

    @cached_property
    def _distance(self) -> OutputDistance:
        """To the teacher, on the images on which the steps before were judged."""
        images = judged_images(self.lesson.dataset, JUDGED)
        return OutputDistance(capture(self.lesson.teacher.network, images[:2]), images)
