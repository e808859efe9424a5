"""What is measured: the constants of the protocol, and from them the list of all trainings and measurements.

Tables and figures ask for measurements; one that several of them ask for is made once. Nothing here runs anything.
"""
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import train
from plumbing.files import InputError

METHODS = ("sft", "sft-teacher", "off-policy", "pso", "dopsd")      # rows of the tables, ours last
BASE, TEACHER = "base", "teacher's view"                            # rows of reference, which nothing is trained for
VALIDATION = "validation"                                           # the measures, on renderings


@dataclass(frozen=True)
class Settings:
    """A protocol: all that decides the numbers besides the model, the concepts and the recipe of options.py."""
    objects: int = 6                    # test concepts of each kind
    styles: int = 2
    tuning_objects: int = 2             # concepts, besides the style of examples/chalk, on which rates are chosen
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; the first one also for learning rates, curves and lessons
    steps: int = 150                    # optimizer steps of table 1
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)           # learning rates tried for each method
    fixed: tuple[tuple[str, float], ...] = ()               # (method, learning rate): taken instead of trying
    curve_steps: tuple[int, ...] = (10, 25, 50, 100, 150)   # optimizer steps at which curves are measured, besides 0
    curve_objects: int = 2              # curves and lessons: the first of the test concepts
    curve_styles: int = 1
    teachers: bool = True               # the curves of different teachers, ablation (b)
    lessons: bool = True                # what the numbers of the recipe do
    lesson_samplers: tuple[int, ...] = (4, 8)               # solver steps with which rollouts of 2, 4 and 8 are sampled
    part: float = 0.8                   # "learned": this part of the teacher's concept fidelity
    concept_prompts: int = 40           # new prompts with [V], each with its own noise
    ordinary_prompts: int = 120         # prompts without [V]
    diverse_prompts: int = 4            # prompts with [V] that are drawn several times,
    diverse_noises: int = 8             # from so many noises
    validation_scenes: int = 8          # on renderings of which the measures are validated
    draw_seed: int = 2605               # of concepts, prompts and noises
    methods: tuple[str, ...] = METHODS  # may grow in one results file

    def __post_init__(self) -> None:
        for method in (*self.methods, *dict(self.fixed)):
            if method not in METHODS:
                raise InputError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")

    def facts(self) -> dict:
        """The constants, without what may grow in one results file."""
        return {name: value for name, value in asdict(self).items() if name != "methods"}


FULL = Settings()
# About ten minutes on two cores. The learning rates are not chosen but given.
QUICK = Settings(objects=1, styles=1, seeds=(0,), steps=100, fixed=tuple((method, 3e-4) for method in METHODS),
                 curve_steps=(10, 25, 50, 100), curve_objects=1, lessons=False, concept_prompts=24,
                 ordinary_prompts=60, diverse_prompts=2, diverse_noises=6)


def passes_per_step(method: str, K: int, grad_states: int | None = None) -> int:
    """Forward passes of the transformer per optimizer step (one batch each; backward passes are not counted)."""
    return train.METHODS[method].passes(K, grad_states or K) if method in METHODS else 0    # else nothing is trained


# ---------------------------------------------------------------------------------------------------- what is done
@dataclass(frozen=True)
class Training:
    """One run of train.py; of BASE, TEACHER and VALIDATION only method and concept count."""
    method: str
    concept: str = ""
    seed: int | None = None
    lr: float | None = None
    options: tuple[tuple[str, str | int | float], ...] = ()         # of train.py, where they differ from the recipe

    @property
    def name(self) -> str:
        """Of its folder and in the results."""
        of_run = [] if self.lr is None else [f"seed{self.seed}", f"lr{self.lr:g}"]
        options = [f"{key}-{value}" for key, value in self.options]
        method = self.method.replace("'", "").replace(" ", "-")
        return "_".join(filter(None, [method, self.concept, *of_run, *options]))

    @property
    def is_trained(self) -> bool:
        return self.method in METHODS


@dataclass(frozen=True)
class Measurement:
    """A training after `step` optimizer steps, sampled with `sampler` solver steps."""
    training: Training
    step: int = 0
    sampler: int = 4
    groups: tuple[str, ...] = field(default=(), compare=False)      # the parts that ask for it


@dataclass(frozen=True)
class Job:
    """What one worker does at a stretch: a training and its measurements in order."""
    training: Training
    measurements: tuple[Measurement, ...] = ()
    words: tuple[str, ...] = ()         # of train.py's command line: data and teachers
    passes: int = 0                     # forward passes of one optimizer step
    kind: str = ""                      # of the concept
    step: int = 0                       # train until here first, whatever is measured


def left(jobs: list[Job], done: Container[Measurement]) -> list[Job]:
    """Of each job what is not measured yet."""
    jobs = [replace(job, measurements=tuple(m for m in job.measurements if m not in done)) for job in jobs]
    return [job for job in jobs if job.measurements]


# ---------------------------------------------------------------------------------------------------- the plan
# Curves, label -> (method, options of train.py, steps after those of the protocol)
METHOD_CURVES = {method: (method, {}) for method in ("sft", "sft-teacher", "off-policy", "dopsd")}  # ablation (a)
TEACHERS = {"live copy": ("dopsd", {"teacher": "copy"}), "EMA 0.9": ("dopsd", {"ema": 0.9}),        # ablation (b)
            "frozen base": ("dopsd", {"teacher": "base"})}
ROLLOUTS = (2, 4, 8)
LESSONS = {**{f"loss {loss}": ("dopsd", {"loss": loss}) for loss in ("v", "x0")},
           **{f"rollout steps K {K}": ("dopsd", {"rollout_steps": K}) for K in ROLLOUTS},
           **{f"states with gradient {n}": ("dopsd", {"grad_states": n}) for n in (1, 2, 4)},
           **{f"rank {rank}": ("dopsd", {"rank": rank, "alpha": rank}) for rank in (4, 16, 64)}}
EARLY = (10, 25, 50)    # optimizer steps at which runs are measured for table 3, besides 0 and the steps of table 1
GENTLE = 3e-4           # learning rate of the embedded recipe: table 1 once more for two methods, first seed
# Claims of the paper that do not show in 150 steps: is the run too short, the EMA too slow, the grid too kind? In 300
# steps the recipe's EMA takes 1 - 0.999^300 = 0.26 of what is new, the paper's 0.9999 in 2000 steps 0.18. On the grid
# of K = 4 the last state holds 0.23 of the picture, on that of K = 8 0.41: there a trajectory can differ more.
LONGER = 300
CAUSES = {"D-OPSD": ("dopsd", {}, [LONGER]), "off-policy": ("off-policy", {}, [LONGER]),
          "D-OPSD, frozen base": ("dopsd", {"teacher": "base"}, [LONGER]),
          "D-OPSD, EMA 0.99": ("dopsd", {"ema": 0.99}, [LONGER]),
          "D-OPSD, K = 8": ("dopsd", {"rollout_steps": 8}),
          "off-policy, K = 8": ("off-policy", {"rollout_steps": 8})}
Curve = dict[int, list[Measurement]]    # optimizer steps -> one measurement for each concept


class Plan:
    """All measurements of a protocol. concepts: name -> {"kind", "tuning", ...}, in order; recipe: of options.Recipe;
    rates: method -> learning rate, when they are chosen. What has none is not in the plan."""

    def __init__(self, settings: Settings, concepts: dict[str, dict], recipe: dict,
                 rates: dict[str, float] | None = None) -> None:
        self.settings, self.concepts, self.recipe, self.rates = settings, concepts, recipe, rates or {}
        self.sampler = recipe["inference_steps"]                    # the model's own
        self.early_steps = [0, *(step for step in EARLY if step < settings.steps), settings.steps]
        self.test = [name for name, facts in concepts.items() if not facts["tuning"]]
        self.tuning_concepts = [name for name, facts in concepts.items() if facts["tuning"]]
        objects, styles = ([name for name in self.test if concepts[name]["kind"] == kind]
                           for kind in ("object", "style"))
        self.curve_concepts = objects[:settings.curve_objects] + styles[:settings.curve_styles]

    def passes(self, training: Training, steps: int = 1) -> int:
        """Forward passes of so many optimizer steps."""
        options = {**self.recipe, **dict(training.options)}
        return steps * self.recipe["accumulate"] * passes_per_step(training.method, options["rollout_steps"],
                                                                   options.get("grad_states"))

    def equal_steps(self, method: str) -> int:
        """Optimizer steps with which a method has as many forward passes as D-OPSD in table 1."""
        K = self.recipe["rollout_steps"]
        return max(1, round(self.settings.steps * passes_per_step("dopsd", K) / passes_per_step(method, K)))

    def reference(self, method: str, concepts: Iterable[str]) -> list[Measurement]:
        """Of the base or the teacher's view."""
        return [Measurement(Training(method, concept), 0, self.sampler) for concept in concepts]

    def trained(self, method: str, concepts: Iterable[str], step: int, options: dict | None = None,
                rate: float | None = None, seeds: Iterable[int] | None = None) -> list[Measurement]:
        """One per concept and seed. Without rate the chosen one, without seeds the first one.

        options that only repeat the recipe are left out, so that the training is the one of the tables.
        """
        usual = {**self.recipe, "teacher": "ema", "grad_states": self.recipe["rollout_steps"]}
        changed = tuple((key, value) for key, value in (options or {}).items() if usual[key] != value)
        rate = rate or self.rates.get(method)
        return [Measurement(Training(method, concept, seed, rate, changed), step, self.sampler)
                for concept in concepts for seed in seeds or self.settings.seeds[:1] if rate]

    def tuning(self, method: str, rate: float) -> list[Measurement]:
        return self.trained(method, self.tuning_concepts, self.settings.steps, rate=rate)

    def table(self, method: str, equal: str) -> list[Measurement]:
        """All test concepts and seeds. equal: "steps" (table 1) or "passes" (table 2)."""
        step = self.settings.steps if equal == "steps" else self.equal_steps(method)
        return self.trained(method, self.test, step, seeds=self.settings.seeds)

    def gentle(self, method: str) -> list[Measurement]:
        """Table 1 at a smaller learning rate, first seed."""
        return self.trained(method, self.test, self.settings.steps, rate=GENTLE)

    def curve(self, method: str, options: dict | None = None, longer: Iterable[int] = (),
              concepts: Iterable[str] | None = None, steps: Iterable[int] | None = None) -> Curve:
        """First seed; 0 is the base. longer: more steps."""
        if method not in self.rates:
            return {}
        concepts, steps = concepts or self.curve_concepts, steps or self.settings.curve_steps
        return {0: self.reference(BASE, concepts),
                **{step: self.trained(method, concepts, step, options) for step in (*steps, *longer)}}

    def early(self, method: str, concept: str) -> Curve:
        """Of one concept: how table 3 finds where a fidelity is reached."""
        return self.curve(method, concepts=[concept], steps=self.early_steps[1:])

    def curves(self, variants: dict[str, tuple]) -> dict[str, Curve]:
        """Of METHOD_CURVES and the like, by label."""
        return {label: self.curve(*variant) for label, variant in variants.items()}

    def ablations(self) -> dict[str, dict[str, Curve]]:
        """Title -> label -> curve."""
        teachers = {**TEACHERS, f"EMA {self.recipe['ema']:g}": ("dopsd",)}
        return {"methods": self.curves(METHOD_CURVES),
                **({"teachers of D-OPSD": self.curves(teachers)} if self.settings.teachers else {})}

    def samplers(self) -> dict[str, Curve]:
        """Label -> solver steps -> measured: students of K steps and the references, sampled with other numbers."""
        concepts, last = self.curve_concepts, self.settings.curve_steps[-1]
        found = {f"K = {K}": self.trained("dopsd", concepts, last, {"rollout_steps": K}) for K in ROLLOUTS}
        found |= {name: self.reference(name, concepts) for name in (BASE, TEACHER)}
        return {label: {sampler: [replace(m, sampler=sampler) for m in measurements]
                        for sampler in self.settings.lesson_samplers} for label, measurements in found.items()}

    def first_part(self) -> dict[str, list[Measurement]]:
        """What is measured before learning rates are chosen: part -> measurements."""
        tuned = [method for method in self.settings.methods if method not in dict(self.settings.fixed)]
        concepts = self.test + (self.tuning_concepts if tuned else [])
        return {VALIDATION: [Measurement(Training(VALIDATION))],
                "reference": [m for method in (BASE, TEACHER) for m in self.reference(method, concepts)],
                "tuning": [m for method in tuned for rate in self.settings.rates for m in self.tuning(method, rate)]}

    def second_part(self) -> dict[str, list[Measurement]]:
        """Tables and curves: part -> measurements."""
        return {"table 1": [m for method in self.rates for m in self.table(method, "steps")],
                "table 2": [m for method in self.rates for m in self.table(method, "passes")],
                "table 3": together(self.early(method, name) for method in self.rates for name in self.test),
                "curves": together(curve for curves in self.ablations().values() for curve in curves.values())}

    def third_part(self) -> dict[str, list[Measurement]]:
        """What the numbers of the recipe do, and where the small world differs from the paper: part -> measurements."""
        if not self.settings.lessons:
            return {}
        lessons = [*self.curves(LESSONS).values(), *self.samplers().values()]
        return {"lessons": together(lessons if "dopsd" in self.rates else []),
                "gentle": [m for method in ("sft", "dopsd") if method in self.rates for m in self.gentle(method)],
                "causes": together(self.curves(CAUSES).values())}

    def jobs(self, parts: dict[str, list[Measurement]], data: dict[str, Path]) -> list[Job]:
        """The trainings of `parts`, long ones first (the end then comes evenly). data: folder of each concept."""
        groups: dict[Training, dict[Measurement, list[str]]] = {}
        for part, measurements in parts.items():
            for m in dict.fromkeys(measurements):
                groups.setdefault(m.training, {}).setdefault(m, []).append(part)
        jobs = []
        for training, found in groups.items():
            in_order = sorted(found, key=lambda m: (m.step, m.sampler))
            measurements = tuple(replace(m, groups=tuple(found[m])) for m in in_order)
            words = ("--data", str(data[training.concept])) if training.is_trained else ()
            kind = self.concepts[training.concept]["kind"] if training.concept else ""
            jobs.append(Job(training, measurements, words, self.passes(training), kind))
        return sorted(jobs, key=lambda job: -2 * job.passes * job.measurements[-1].step - 300 * len(job.measurements))


def together(curves: Iterable[Curve]) -> list[Measurement]:
    return [m for curve in curves for measurements in curve.values() for m in measurements]
