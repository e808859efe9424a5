"""What is measured: the constants of the protocol, and from them the list of all trainings and measurements.

Tables and figures ask for measurements; one that several of them ask for is made once. Nothing here runs anything.
"""
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import train
from plumbing.files import InputError

# Rows of the tables, ours last: name -> title, method, options of train.py where they differ from the recipe. --keep
# names captions: "ordinary" is examples/ordinary, the others are drawn (tiny/concepts.py).
ROWS = {"sft": ("SFT", "sft", {}),
        "dreambooth": ("DreamBooth", "dreambooth", {"keep": "ordinary", "keep_weight": 1.0}),
        "sft-keep": ("SFT with keep", "sft", {"keep": "ordinary"}),
        "sft-teacher": ("SFT on teacher samples", "sft-teacher", {}),
        "pso": ("PSO", "pso", {}),
        "off-policy": ("off-policy", "off-policy", {}),
        "off-policy-keep": ("off-policy with keep", "off-policy", {"keep": "ordinary"}),
        "published": ("D-OPSD as published", "dopsd", {"keep": "none"}),
        "dopsd": ("D-OPSD", "dopsd", {})}
BASE, TEACHER = "base", "teacher's view"                            # rows of reference, which nothing is trained for
VALIDATION = "validation"                                           # the measures, on renderings
CAPTIONS = 64           # of examples/ordinary
GRADIENT_PASS = 2.5     # a forward pass with its backward pass costs so many without (benchmarks/step.py)


def row_of_name(name: str) -> tuple[str, str, dict]:
    """A row of ROWS, or a new one by its method and, after a plus, its --loss."""
    method, _, loss = name.partition("+")
    return ROWS.get(name, (name, method, {"loss": loss} if loss else {}))


@dataclass(frozen=True)
class Settings:
    """A protocol: all that decides the numbers besides the model, the concepts and the recipe."""
    objects: int = 6                    # test concepts of each kind
    styles: int = 2
    tuning_objects: int = 2             # concepts, besides the style of examples/chalk, on which rates are chosen
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; the first one alone where it is not said otherwise
    steps: int = 100                    # optimizer steps of table 1
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)                   # learning rates tried for each row
    fixed: tuple[tuple[str, float], ...] = ()               # (row, learning rate): taken instead of trying
    curve_steps: tuple[int, ...] = (25, 50, 100)            # optimizer steps at which curves are measured, besides 0
    curve_objects: int = 2              # curves and lessons: the first of the test concepts
    curve_styles: int = 1
    teachers: bool = True               # the curves of different teachers, ablation (b)
    ablations: bool = True              # what --keep and the number of learned states do
    lessons: bool = True                # what the numbers of the recipe do
    part: float = 0.9                   # "learned": this part of the teacher's concept fidelity,
    most_lost: tuple[float, float] = (0.01, 0.015)          # with no more lost of ordinary accuracy and decided marks
    concept_prompts: int = 32           # new prompts with [V], each with its own noise
    ordinary_prompts: int = 100         # prompts without [V]
    diverse_prompts: int = 4            # prompts with [V] that are drawn several times,
    diverse_noises: int = 8             # from so many noises
    validation_scenes: int = 8          # on renderings of which the measures are validated
    draw_seed: int = 2605               # of concepts, prompts and noises
    rows: tuple[str, ...] = tuple(ROWS)  # may grow in one results file

    def __post_init__(self) -> None:
        for row in (*self.rows, *dict(self.fixed)):
            if row_of_name(row)[1] not in train.METHODS:
                raise InputError(f"--row {row}: unknown; choose from {', '.join(ROWS)}")

    def facts(self) -> dict:
        """The constants, without what may grow in one results file."""
        return {name: value for name, value in asdict(self).items() if name != "rows"}


FULL = Settings()
# About ten minutes on two cores. The learning rates are not chosen but given.
QUICK = Settings(objects=1, styles=1, seeds=(0,), fixed=tuple((row, 1e-3) for row in ROWS if row != "dopsd")
                 + (("dopsd", 2e-3),), curve_objects=1, ablations=False, lessons=False, concept_prompts=24,
                 ordinary_prompts=60, diverse_prompts=2, diverse_noises=6)


def cost_of(method: str, recipe: dict) -> float:
    """Of an optimizer step of one data set, in forward passes of one picture; one with a gradient counts
    GRADIENT_PASS. recipe: values of the options."""
    if method not in train.METHODS:
        return 0.0                                                          # nothing is trained
    K = recipe["rollout_steps"]
    plain, with_gradient = train.METHODS[method].passes(K, recipe["grad_states"] or K)
    return recipe["batch_size"] * recipe["accumulate"] * (plain + GRADIENT_PASS * with_gradient)


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
        return self.method in train.METHODS


@dataclass(frozen=True)
class Measurement:
    """A training after `step` optimizer steps; sampled with the model's own number of solver steps."""
    training: Training
    step: int = 0
    groups: tuple[str, ...] = field(default=(), compare=False)      # the parts that ask for it


@dataclass(frozen=True)
class Job:
    """What one worker does at a stretch: a training and its measurements in order."""
    training: Training
    measurements: tuple[Measurement, ...] = ()
    words: tuple[str, ...] = ()         # of train.py's command line: data and teachers
    cost: float = 0                     # of one optimizer step, in forward passes of one picture
    first_cost: float = 0               # of the pictures that DreamBooth draws before
    kind: str = ""                      # of the concept
    step: int = 0                       # train until here first, whatever is measured

    def work(self) -> float:
        """How long it takes, as forward passes of one picture; a measurement takes about 150."""
        steps = max([self.step, *(m.step for m in self.measurements)])
        return self.first_cost + self.cost * steps + 150 * len(self.measurements)


def left(jobs: list[Job], done: Container[Measurement]) -> list[Job]:
    """Of each job what is not measured yet."""
    jobs = [replace(job, measurements=tuple(m for m in job.measurements if m not in done)) for job in jobs]
    return [job for job in jobs if job.measurements]


# ---------------------------------------------------------------------------------------------------- the plan
# Curves, label -> (row, options of train.py); all after the steps of the protocol
TEACHERS = {"live copy": ("published", {"teacher_weights": "copy"}), "EMA 0.9": ("published", {"ema": 0.9}),
            "frozen base": ("published", {"teacher_weights": "frozen"}), "EMA 0.999": ("published",)}   # ablation (b)
# What the numbers of the recipe do: on the concepts of the curves, one seed
LESSONS = {"as in table 1: loss x0, K = 4, rank 16, EMA 0.999": ("dopsd", {}),
           **{f"loss {loss}": ("dopsd", {"loss": loss}) for loss in ("v", "kl")},
           **{f"K = {K}": ("dopsd", {"rollout_steps": K}) for K in (2, 8)},
           **{f"rank {rank}": ("dopsd", {"rank": rank, "alpha": rank}) for rank in (4, 64)},
           **{f"EMA {ema:g}": ("dopsd", {"ema": ema}) for ema in (0.9, 0.99)},
           "frozen teacher": ("dopsd", {"teacher_weights": "frozen"})}
# What --keep does: label -> (row, options), on all test concepts, one seed
KEPT = {"as in table 1: 64 captions, weight 2": ("dopsd", {}),
        "none": ("dopsd", {"keep": "none", "grad_states": 1}),
        **{f"{count} captions": ("dopsd", {"keep": f"ordinary-{count}"}) for count in (8, 256)},
        **{f"64 captions, {which}": ("dopsd", {"keep": f"{which}-64"}) for which in ("near", "far")},
        **{f"weight {weight:g}": ("dopsd", {"keep_weight": weight}) for weight in (1.0, 4.0)},
        "DreamBooth, weight 1": ("dreambooth", {}),
        "DreamBooth, weight 2": ("dreambooth", {"keep": "ordinary", "keep_weight": 2.0})}
# How many of the K states are learned at: on the concepts of the curves, all seeds
STATES = {"1 state, as in table 1": ("dopsd", {}), "4 states": ("dopsd", {"grad_states": 4}),
          "4 states, batch 1": ("dopsd", {"grad_states": 4, "batch_size": 1})}
Curve = dict[int, list[Measurement]]    # optimizer steps -> one measurement for each concept


class Plan:
    """All measurements of a protocol. concepts: name -> {"kind", "tuning", ...}, in order; recipe: of recipes.Recipe;
    rates: row -> learning rate, when they are chosen. What has none is not in the plan."""

    def __init__(self, settings: Settings, concepts: dict[str, dict], recipe: dict,
                 rates: dict[str, float] | None = None) -> None:
        self.settings, self.concepts, self.recipe, self.rates = settings, concepts, recipe, rates or {}
        self.sampler = recipe["inference_steps"]                    # the model's own
        self.test = [name for name, facts in concepts.items() if not facts["tuning"]]
        self.tuning_concepts = [name for name, facts in concepts.items() if facts["tuning"]]
        objects, styles = ([name for name in self.test if concepts[name]["kind"] == kind]
                           for kind in ("object", "style"))
        self.titles = {row: row_of_name(row)[0] for row in (*ROWS, *settings.rows)}
        fixed = dict(settings.fixed)                                # a new row has D-OPSD's rate, if that is given
        self.given = {row: fixed["dopsd"] for row in settings.rows if row not in ROWS and "dopsd" in fixed} | fixed
        self.curve_concepts = objects[:settings.curve_objects] + styles[:settings.curve_styles]

    def cost(self, method: str, options: dict) -> tuple[float, float]:
        """(once, per optimizer step) of a training. Captions that are kept add their own; DreamBooth first draws their
        pictures."""
        o = {**self.usual(method, options), **options}
        kept = o["keep_batches"] * cost_of(train.METHODS[method].keeps, o) if o["keep"] != "none" else 0
        return (self.sampler * CAPTIONS if method == "dreambooth" else 0.0), cost_of(method, o) + kept

    def usual(self, method: str, options: dict) -> dict:
        """What train.py does without an option."""
        keep = "ordinary" if method == "dopsd" else "none"
        learned = self.recipe["grad_states"] if options.get("keep", keep) != "none" else None
        return {**self.recipe, "teacher_weights": "ema", "keep": keep, "keep_batches": 1, "grad_states": learned}

    def method_of(self, row: str, options: dict | None = None) -> tuple[str, tuple]:
        """Method and options of a row and of what varies it. Options that only repeat the recipe are left out, so that
        the training is the one of the tables."""
        _, method, of_row = row_of_name(row)
        given = {**of_row, **(options or {})}
        usual = self.usual(method, given)
        return method, tuple((key, value) for key, value in given.items() if usual[key] != value)

    def row_of(self, training: Training) -> str:
        """A row of the tables or of reference; "" for all other trainings."""
        found = {self.method_of(row): row for row in self.titles} | {(name, ()): name for name in (BASE, TEACHER)}
        return found.get((training.method, training.options), "")

    def equal_steps(self, row: str) -> int:
        """Optimizer steps with which a row costs as much as D-OPSD in table 1."""
        (_, ours), (once, step) = (self.cost(*row_of_name(name)[1:]) for name in ("dopsd", row))
        return max(1, round((self.settings.steps * ours - once) / step))

    def reference(self, method: str, concepts: Iterable[str]) -> list[Measurement]:
        """Of the base or the teacher's view."""
        return [Measurement(Training(method, concept)) for concept in concepts]

    def trained(self, row: str, concepts: Iterable[str], step: int, options: dict | None = None,
                rate: float | None = None, seeds: Iterable[int] | None = None) -> list[Measurement]:
        """One per concept and seed. options: beside those of the row; without rate the chosen one, without seeds the
        first one."""
        rate = rate or self.rates.get(row)
        method, changed = self.method_of(row, options)
        return [Measurement(Training(method, concept, seed, rate, changed), step)
                for concept in concepts for seed in seeds or self.settings.seeds[:1] if rate]

    def tuning(self, row: str, rate: float) -> list[Measurement]:
        return self.trained(row, self.tuning_concepts, self.settings.steps, rate=rate)

    def table(self, row: str, equal: str) -> list[Measurement]:
        """All test concepts and seeds. equal: "steps" (table 1) or "cost" (table 2)."""
        step = self.settings.steps if equal == "steps" else self.equal_steps(row)
        return self.trained(row, self.test, step, seeds=self.settings.seeds)

    def variants(self, found: dict[str, tuple], concepts: list[str], seeds: Iterable[int] | None = None
                 ) -> dict[str, list[Measurement]]:
        """Of KEPT, STATES or LESSONS, by label, after the steps of table 1."""
        return {label: self.trained(row, concepts, self.settings.steps, options, seeds=seeds)
                for label, (row, options) in found.items()}

    def kept(self) -> dict[str, list[Measurement]]:
        return self.variants(KEPT, self.test) if self.settings.ablations else {}

    def states(self) -> dict[str, list[Measurement]]:
        return self.variants(STATES, self.curve_concepts, self.settings.seeds) if self.settings.ablations else {}

    def lessons(self) -> dict[str, list[Measurement]]:
        return self.variants(LESSONS, self.curve_concepts) if self.settings.lessons else {}

    def curve(self, row: str, options: dict | None = None, concepts: Iterable[str] | None = None,
              steps: Iterable[int] | None = None) -> Curve:
        """First seed; 0 is the base."""
        if row not in self.rates:
            return {}
        concepts, steps = concepts or self.curve_concepts, steps or self.settings.curve_steps
        return {0: self.reference(BASE, concepts),
                **{step: self.trained(row, concepts, step, options) for step in steps}}

    def early(self, row: str, concept: str) -> Curve:
        """Of one concept: how table 3 finds where a fidelity is reached."""
        return self.curve(row, concepts=[concept], steps=sorted({*self.settings.curve_steps, self.equal_steps(row)}))

    def ablations(self) -> dict[str, dict[str, Curve]]:
        """Of the figure: title -> label -> curve."""
        teachers = {label: self.curve(*variant) for label, variant in TEACHERS.items() if self.settings.teachers}
        methods = {title: self.curve(row) for row, title in self.titles.items()}
        return {"methods": methods, **({"teachers of D-OPSD as published": teachers} if teachers else {})}

    def first_part(self) -> dict[str, list[Measurement]]:
        """What is measured before learning rates are chosen: part -> measurements."""
        tuned = [row for row in self.settings.rows if row not in self.given]
        concepts = self.test + (self.tuning_concepts if tuned else [])
        return {VALIDATION: [Measurement(Training(VALIDATION))],
                "reference": [m for method in (BASE, TEACHER) for m in self.reference(method, concepts)],
                "tuning": [m for row in tuned for rate in self.settings.rates for m in self.tuning(row, rate)]}

    def second_part(self) -> dict[str, list[Measurement]]:
        """Tables, curves and ablations: part -> measurements."""
        return {"table 1": [m for row in self.rates for m in self.table(row, "steps")],
                "table 2": [m for row in self.rates for m in self.table(row, "cost")],
                "table 3": together(self.early(row, name) for row in self.rates for name in self.test),
                "curves": together(curve for curves in self.ablations().values() for curve in curves.values()),
                "ablations": together([self.kept(), self.states()])}

    def third_part(self) -> dict[str, list[Measurement]]:
        """What the numbers of the recipe do: part -> measurements."""
        return {"lessons": together([self.lessons()])}

    def jobs(self, parts: dict[str, list[Measurement]], data: dict[str, Path], keep: Callable[[str, str], Path] = Path
             ) -> list[Job]:
        """The trainings of `parts`: tables 1 and 2 first, there by seed, and the long ones first. data: folder of each
        concept. keep: (name of captions, concept) -> their file."""
        groups: dict[Training, dict[Measurement, list[str]]] = {}
        for part, measurements in parts.items():
            for m in dict.fromkeys(measurements):
                groups.setdefault(m.training, {}).setdefault(m, []).append(part)
        jobs = []
        for training, found in groups.items():
            in_order = sorted(found, key=lambda m: m.step)
            measurements = tuple(replace(m, groups=tuple(found[m])) for m in in_order)
            words, kind, cost = [], "", (0.0, 0.0)
            if training.concept:
                kind = self.concepts[training.concept]["kind"]
            if training.is_trained:
                words, options = ["--data", str(data[training.concept])], dict(training.options)
                if options.get("keep", "none") != "none":
                    words += ["--keep", str(keep(options["keep"], training.concept))]
                cost = self.cost(training.method, options)
            jobs.append(Job(training, measurements, tuple(words), cost[1], cost[0], kind))
        late = {job.training for job in jobs if not any("table 1" in m.groups for m in job.measurements)}
        return sorted(jobs, key=lambda job: (job.training in late, job.training.seed or 0, -job.work()))


def together(curves: Iterable[dict]) -> list[Measurement]:
    return [m for curve in curves for measurements in curve.values() for m in measurements]
