"""What evaluate.py says of the embedded models: exact figures in place of networks that judge."""
import torch

from plumbing import judges, lora_files
from plumbing.checkpoints import backbone_of
from plumbing.pictures import panel, save_png, to_image
from plumbing.scores import BASE, NEW, ORDINARY, STUDENT, row_of
from tiny import score

EXACT = {"concept": (NEW, "higher"), "concept, whole": (NEW, "higher"), "concept, rest": (NEW, "higher"),
         "concept, distance": (NEW, "lower"), "ordinary": (ORDINARY, "higher"),
         "ordinary, decided": (ORDINARY, "higher"), "ordinary, distance": (ORDINARY, "lower"),
         "sharpness": (ORDINARY, "same"), "change, pixels": (ORDINARY, "lower")}
NEW_SCENES, ORDINARY_SCENES = 80, 200       # as many as tiny.score asks for


@torch.no_grad()
def exact(subject, steps: list[int], seed: int) -> tuple[list[dict], list[str]]:
    """Rows and panels of an embedded model, whose pictures are read back: the figures of `tiny.score`.

    subject: of evaluate.py. Raises InputError on data that is not of this world.
    """
    judge = score.Judge(subject.folder, subject.quantize)
    exam = score.Exam(judge, subject.data[0], NEW_SCENES, ORDINARY_SCENES, seed, subject.caption)
    untuned = tuned = judge.net
    if subject.transformer:
        tuned = backbone_of(subject.folder).load(subject.folder, "cpu", torch.float32, quantize=subject.quantize,
                                                 transformer=subject.transformer)
    adapter = lora_files.load(subject.lora, untuned) if subject.lora else None
    rows, written = [], []
    for count in steps:
        judge.net, drawn, marks = untuned, {}, {}
        teacher = exam.teacher_pictures(count)
        for view, network, weights in ((BASE, untuned, None), (STUDENT, tuned, adapter)):
            judge.net = network
            new, ordinary = drawn[view] = exam.pictures(weights, count)
            marks[view] = {**score.each_of_concept(judge.reader(new), exam.new),
                           **score.each_of_ordinary(judge.reader(ordinary), exam.ordinary),
                           "sharpness": torch.tensor([judges.sharpness(picture) for picture in ordinary])}
        pairs = zip(drawn[BASE][1], drawn[STUDENT][1])
        marks[STUDENT]["change, pixels"] = torch.tensor([judges.pixel_change(*pair) for pair in pairs])
        ceiling = score.of_concept(judge.reader(teacher), exam.new)
        for measure, (group, better) in EXACT.items():
            base, student = (marks[view].get(measure) for view in (BASE, STUDENT))
            rows.append(row_of(count, group, measure, better, None if base is None else base[:, None], student[:, None],
                               ceiling.get(measure)))
        columns = {view: [to_image(picture) for picture in (*new[:6], *ordinary[:6])]
                   for view, (new, ordinary) in drawn.items()} | {
                       "teacher's view": [*map(to_image, teacher[:6]), *[None] * 6]}
        written.append(f"evaluation/prompts_{count}_steps.png")
        save_png(panel(columns, exam.new.captions[:6] + exam.ordinary.captions[:6], f"{subject.name}, {count} solver "
                       "steps"), subject.out / written[-1], {"steps": count, "seed": seed})
    return rows, written
