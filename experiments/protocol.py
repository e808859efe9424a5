"""What is measured: the constants of the protocol, and from them the list of all runs and measurements.

A `Training` is one training run, a `Measurement` is one look at it. Tables and figures ask for measurements; one that
several ask for is made once. Nothing here runs anything.
"""
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields

from plumbing.files import InputError

METHODS = ("sft", "sft-teacher", "off-policy", "pso", "dopsd")      # rows of the tables, ours last
BASE, TEACHER = "base", "teacher's view"                            # rows of reference, which nothing is trained for
CURVES = ("sft", "sft-teacher", "off-policy", "dopsd")              # ablation (a) of the paper
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
    methods: tuple[str, ...] = field(default=METHODS, metadata={"subset": True})   # may grow in one results file

    def __post_init__(self) -> None:
        for method in (*self.methods, *(method for method, _ in self.fixed)):
            if method not in METHODS:
                raise InputError(f"--method {method}: unknown; choose from {', '.join(METHODS)}")


FULL = Settings()
# About ten minutes on two cores. The learning rates are not chosen but given.
QUICK = Settings(objects=1, styles=1, seeds=(0,), steps=100, fixed=tuple((method, 3e-4) for method in METHODS),
                 curve_steps=(10, 25, 50, 100), curve_objects=1, lessons=False, concept_prompts=24,
                 ordinary_prompts=60, diverse_prompts=2, diverse_noises=6)


def to_facts(settings: Settings) -> dict:
    """The constants as JSON has them, without what may grow in one results file."""
    kept = {f.name for f in fields(settings) if "subset" not in f.metadata}
    return {name: value for name, value in asdict(settings).items() if name in kept}


def from_facts(facts: dict) -> Settings:
    """The settings that a results file was written with."""
    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value
    return Settings(**{name: frozen(value) for name, value in facts.items()})


def passes_per_step(method: str, K: int, grad_states: int | None = None) -> int:
    """Forward passes of the transformer per optimizer step (one batch each; backward passes are not counted)."""
    return {"dopsd": K + (grad_states or K),    # the student walks K states, the teacher sees those that are learned
            "off-policy": 2 * K,                # both see the K states of the teacher
            "sft": 1,
            "sft-teacher": K + 1,               # the teacher samples, the student learns at one noise level
            "pso": K + 4}[method]               # the student samples; student and base see both pictures of the pair


# ---------------------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Training:
    """One training run; of BASE, TEACHER and VALIDATION only method and concept count."""
    method: str
    concept: str = ""
    seed: int | None = None
    lr: float | None = None
    options: tuple[tuple[str, str | int | float], ...] = ()         # of train.py, where they differ from the recipe

    @property
    def name(self) -> str:
        """Of its folder and in the results."""
        parts = [self.method.replace("'", "").replace(" ", "-"), self.concept]
        if self.lr is not None:
            parts += [f"seed{self.seed}", f"lr{self.lr:g}"]
        return "_".join(part for part in [*parts, *(f"{key}-{value}" for key, value in self.options)] if part)

    @property
    def is_trained(self) -> bool:
        return self.method in METHODS


@dataclass(frozen=True)
class Measurement:
    """One measurement: a run after `step` optimizer steps, sampled with `sampler` solver steps."""
    training: Training
    step: int = 0
    sampler: int = 4


@dataclass(frozen=True)
class Job:
    """What one worker does at a stretch: a run and its measurements in order; groups: the parts that ask for each."""
    training: Training
    measurements: tuple[Measurement, ...]
    groups: tuple[tuple[str, ...], ...]


TEACHERS = {"live copy": {"teacher": "copy"}, "EMA 0.9": {"ema": 0.9}, "frozen base": {"teacher": "base"}}
LESSONS = {"loss": {"v": {"loss": "v"}, "x0": {"loss": "x0"}},
           "rollout steps K": {str(k): {"rollout_steps": k} for k in (2, 4, 8)},
           "states with gradient": {str(n): {"grad_states": n} for n in (1, 2, 4)},
           "rank": {str(r): {"rank": r, "alpha": r} for r in (4, 16, 64)}}
EARLY = (10, 25, 50)    # optimizer steps at which runs are measured for table 3, besides 0 and the steps of table 1
GENTLE = 3e-4           # learning rate of the embedded recipe: table 1 once more for two methods, first seed
# Claims of the paper that do not show in 150 steps: is the run too short, the EMA too slow, the grid too kind? In 300
# steps the recipe's EMA takes 1 - 0.999^300 = 0.26 of what is new, the paper's 0.9999 in 2000 steps 0.18. On the grid
# of K = 4 the last state holds 0.23 of the picture, on that of K = 8 0.41: there a trajectory can differ more.
LONGER = 300
CAUSES = {"D-OPSD": ("dopsd", {}, LONGER), "off-policy": ("off-policy", {}, LONGER),
          "D-OPSD, frozen base": ("dopsd", {"teacher": "base"}, LONGER),
          "D-OPSD, EMA 0.99": ("dopsd", {"ema": 0.99}, LONGER),
          "D-OPSD, K = 8": ("dopsd", {"rollout_steps": 8}, None),
          "off-policy, K = 8": ("off-policy", {"rollout_steps": 8}, None)}   # label: method, options, one more step


class Plan:
    """All points of a protocol. concepts: name -> {"kind", "tuning", ...}, in order; recipe: of options.Recipe."""

    def __init__(self, settings: Settings, concepts: dict[str, dict], recipe: dict) -> None:
        self.settings, self.concepts, self.recipe = settings, concepts, recipe
        self.sampler = recipe["inference_steps"]                    # the model's own
        self.early_steps = [0, *(step for step in EARLY if step < settings.steps), settings.steps]
        self.test = [name for name, facts in concepts.items() if not facts["tuning"]]
        self.tuning_concepts = [name for name, facts in concepts.items() if facts["tuning"]]
        of_kind = {kind: [name for name in self.test if concepts[name]["kind"] == kind] for kind in ("object", "style")}
        self.curve_concepts = (of_kind["object"][:settings.curve_objects] + of_kind["style"][:settings.curve_styles])

    # -------------------------------------------------------------------------------------------- single runs
    def passes(self, run: Training, step: int) -> int:
        """Forward passes of a run until `step`."""
        options = dict(run.options)
        K = options.get("rollout_steps", self.recipe["rollout_steps"])
        return step * self.recipe["accumulate"] * passes_per_step(run.method, K, options.get("grad_states"))

    def training(self, method: str, concept: str, seed: int, lr: float, options: dict | None = None) -> Training:
        """options that only repeat the recipe are left out, so that the run is the one of the tables."""
        own = {**self.recipe, "teacher": "ema", "grad_states": self.recipe["rollout_steps"]}
        changed = {key: value for key, value in (options or {}).items() if own[key] != value}
        return Training(method, concept, seed, lr, tuple(changed.items()))

    def equal_steps(self, method: str) -> int:
        """Optimizer steps with which a method has as many forward passes as D-OPSD in table 1."""
        K = self.recipe["rollout_steps"]
        return max(1, round(self.settings.steps * passes_per_step("dopsd", K) / passes_per_step(method, K)))

    # -------------------------------------------------------------------------------------------- parts
    def reference(self, method: str, concepts: Iterable[str], sampler: int | None = None) -> list[Measurement]:
        return [Measurement(Training(method, concept), 0, sampler or self.sampler) for concept in concepts]

    def tuning(self, method: str, rate: float) -> list[Measurement]:
        """One point per tuning concept."""
        return [Measurement(self.training(method, concept, self.settings.seeds[0], rate), self.settings.steps, self.sampler)
                for concept in self.tuning_concepts]

    def table(self, method: str, rates: dict[str, float], equal: str) -> list[Measurement]:
        """One point per test concept and seed. equal: "steps" (table 1) or "passes" (table 2)."""
        if method not in rates:
            return []
        step = self.settings.steps if equal == "steps" else self.equal_steps(method)
        return [Measurement(self.training(method, concept, seed, rates[method]), step, self.sampler)
                for concept in self.test for seed in self.settings.seeds]

    def early(self, method: str, rates: dict[str, float], concept: str) -> dict[int, Measurement]:
        """Step -> a point of one concept, first seed: how table 3 finds where a fidelity is reached; 0 is the base."""
        if method not in rates:
            return {}
        run = self.training(method, concept, self.settings.seeds[0], rates[method])
        return {step: Measurement(run, step, self.sampler) if step else self.reference(BASE, [concept])[0]
                for step in self.early_steps}

    def curve(self, method: str, rates: dict[str, float], options: dict | None = None, longer: int | None = None
              ) -> dict[int, list[Measurement]]:
        """Step -> one point per concept of the curves; 0 is the base. longer: one more step."""
        if method not in rates:
            return {}
        curve = {0: self.reference(BASE, self.curve_concepts)}
        for step in (*self.settings.curve_steps, *([longer] if longer else [])):
            curve[step] = [Measurement(self.training(method, concept, self.settings.seeds[0], rates[method], options), step,
                                 self.sampler) for concept in self.curve_concepts]
        return curve

    def curves(self, rates: dict[str, float]) -> dict[str, dict[str, dict[int, list[Measurement]]]]:
        """Title -> label -> curve."""
        methods = {method: self.curve(method, rates) for method in CURVES}
        teachers = {label: self.curve("dopsd", rates, options) for label, options in TEACHERS.items()}
        teachers[f"EMA {self.recipe['ema']:g}"] = self.curve("dopsd", rates)
        return {"methods": methods, **({"teachers of D-OPSD": teachers} if self.settings.teachers else {})}

    def other_samplers(self, curve: dict[int, list[Measurement]]) -> list[Measurement]:
        """The last points of a curve and what they are compared with, for samplers other than the model's own."""
        ends = [(point.training, point.step) for point in curve.get(self.settings.curve_steps[-1], [])]
        beside = [(Training(name, concept), 0) for name in (BASE, TEACHER) for concept in self.curve_concepts]
        return [Measurement(run, step, sampler) for run, step in ends + beside for sampler in self.settings.lesson_samplers
                if ends and sampler != self.sampler]

    def lessons(self, rates: dict[str, float]) -> dict[str, dict[str, dict[int, list[Measurement]]]]:
        """Number of the recipe -> its value -> curve of D-OPSD."""
        return {title: {value: self.curve("dopsd", rates, options) for value, options in values.items()}
                for title, values in LESSONS.items()} if self.settings.lessons else {}

    def gentle(self, method: str) -> list[Measurement]:
        """Table 1 at a smaller learning rate, first seed."""
        return [Measurement(self.training(method, concept, self.settings.seeds[0], GENTLE), self.settings.steps, self.sampler)
                for concept in self.test]

    def causes(self, rates: dict[str, float]) -> dict[str, dict[int, list[Measurement]]]:
        """Label -> curve of what might explain where the small world differs from the paper."""
        return {label: self.curve(method, rates, options, longer)
                for label, (method, options, longer) in CAUSES.items()} if self.settings.lessons else {}

    # -------------------------------------------------------------------------------------------- everything
    def first_part(self) -> dict[str, list[Measurement]]:
        """What is measured before learning rates are chosen: part -> points."""
        tuned = [method for method in self.settings.methods if method not in dict(self.settings.fixed)]
        concepts = self.test + (self.tuning_concepts if tuned else [])
        reference = [point for method in (BASE, TEACHER) for point in self.reference(method, concepts)]
        return {VALIDATION: [Measurement(Training(VALIDATION))], "reference": reference,
                "tuning": [point for method in tuned for rate in self.settings.rates
                           for point in self.tuning(method, rate)]}

    def second_part(self, rates: dict[str, float]) -> dict[str, list[Measurement]]:
        """Tables and curves: part -> points."""
        rates = self.asked(rates)
        return {"table 1": [p for method in rates for p in self.table(method, rates, "steps")],
                "table 2": [p for method in rates for p in self.table(method, rates, "passes")],
                "table 3": [p for method in rates for concept in self.test
                            for p in self.early(method, rates, concept).values()],
                "curves": [p for curves in self.curves(rates).values() for curve in curves.values()
                           for points in curve.values() for p in points]}

    def third_part(self, rates: dict[str, float]) -> dict[str, list[Measurement]]:
        """What the numbers of the recipe do, and where the small world differs from the paper: part -> points."""
        rates = self.asked(rates)
        lessons = self.lessons(rates)
        return {"lessons": [p for curves in lessons.values() for curve in curves.values()
                            for points in curve.values() for p in points]
                + [p for curve in lessons.get("rollout steps K", {}).values() for p in self.other_samplers(curve)],
                "gentle": [p for method in ("sft", "dopsd") if method in rates and lessons
                           for p in self.gentle(method)],
                "causes": [p for curve in self.causes(rates).values() for points in curve.values() for p in points]}

    def asked(self, rates: dict[str, float]) -> dict[str, float]:
        """The learning rates of those methods that are to be measured."""
        return {method: rate for method, rate in rates.items() if method in self.settings.methods}

    def jobs(self, parts: dict[str, list[Measurement]], done: set[Measurement]) -> list[Job]:
        """The runs of `parts` with points that are not done yet, long ones first (the end then comes evenly).

        The order does not depend on what is done, so a stopped experiment goes on in the same order.
        """
        groups: dict[Measurement, list[str]] = {}
        for part, points in parts.items():
            for point in points:
                if part not in groups.setdefault(point, []):
                    groups[point].append(part)
        runs: dict[Training, list[Measurement]] = {}
        for point in groups:
            runs.setdefault(point.training, []).append(point)
        jobs = []
        for run in sorted(runs, key=lambda run: -self.effort(runs[run])):
            left = sorted((point for point in runs[run] if point not in done), key=lambda p: (p.step, p.sampler))
            if left:
                jobs.append(Job(run, tuple(left), tuple(tuple(groups[point]) for point in left)))
        return jobs

    def effort(self, points: list[Measurement]) -> float:
        """How long a run and its measurements take, roughly, in forward passes of a training batch."""
        run, last = points[0].training, max(point.step for point in points)
        return (2 * self.passes(run, last) if run.is_trained else 0) + 300 * len(points)
