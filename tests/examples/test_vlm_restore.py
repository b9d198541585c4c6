"""The study of a pruned LLaVA: packed questions are single questions, and a run gives what it promises."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, set_seed


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "vlm_restore"
ASKED = [("what color is the shape?", "red"), ("is there a circle?", "no"), ("what is the red shape?", "triangle")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like easy-VQA's, with random images and from one to three questions on each."""
    folder = tmp_path_factory.mktemp("easy_vqa")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 5)):
        pixels = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator).numpy()
        images, lines = [], []
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(pixels[number]).save(file, "PNG")
            images.append(file.getvalue())
            asked = ASKED[: 1 + number % 3]
            lines += [json.dumps({"question": q, "answer": a, "image_id": number}) for q, a in asked]
        table = pa.table({"image_id": list(range(count)), "image_png": images})
        pq.write_table(table, folder / f"{split}_images.parquet")
        (folder / f"{split}_questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(scripts, data, tmp_path_factory):
    """A folder with an untrained model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    set_seed(0)
    tokenizer = scripts("data").make_tokenizer(scripts("data").load_split(data, "train"))
    scripts("model").make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_packed_questions_get_the_predictions_of_single_ones(scripts, data, base):
    module, study = scripts("data"), scripts("runs").Study(data, base, steps=1)
    collate = module.Collator(study.tokenizer)
    packed = collate(study.test)
    logits = study.dense(**packed).logits
    answers = logits[:, :-1][packed["labels"][:, 1:] != -100]
    singles = module.single_questions(study.test)
    assert len(answers) == len(singles) == 9
    for answer, example in zip(answers, singles, strict=True):
        ids = collate([example])["input_ids"]
        alone = study.dense(input_ids=ids, pixel_values=collate([example])["pixel_values"]).logits
        torch.testing.assert_close(answer, alone[0, -2], atol=1e-5, rtol=1e-5)


def test_accuracy_counts_right_answers(scripts, data, base):
    study, module = scripts("runs").Study(data, base, steps=1), scripts("data")
    right = 0
    for example in module.single_questions(study.test):
        batch = module.Collator(study.tokenizer)([example])
        guess = study.dense(input_ids=batch["input_ids"][:, :-1], pixel_values=batch["pixel_values"]).logits[0, -1]
        right += study.tokenizer.convert_ids_to_tokens(int(guess.argmax())) == example.questions[0][1]
    assert scripts("accuracy").measure_accuracy(study.dense, study.test, study.tokenizer) == right / 9


def test_lora_loses_the_zeros_and_sparse_lora_keeps_them(scripts, data, base):
    study, plan = scripts("runs").Study(data, base, steps=2), scripts("plan")
    amounts = (("vision", "2:4"), ("language", "0.5"))
    found = {how: study.run(plan.Run("magnitude", amounts, how)) for how in plan.RESTORATIONS}
    assert found["none"]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found["sparse-lora"]["sparsity"] == found["none"]["sparsity"]
    assert found["sparse-lora-distilled"]["sparsity"] == found["none"]["sparsity"]
    assert found["lora"]["sparsity"] < 0.01
    assert 0 <= found["lora"]["accuracy_with_zeros_put_back"] <= 1


def test_the_plan_has_no_run_twice_and_a_file_for_each(scripts):
    runs = scripts("plan").plan()
    assert len({run.name for run in runs}) == len(runs)
    assert [run.restoration for run in runs[:4]] == list(scripts("plan").RESTORATIONS)
    assert {run.seed for run in runs[:12]} == {0, 1, 2}
    assert runs[0].modality_sparsity == {"vision": "2:4", "language": "2:4"}


def test_the_tower_learns_the_names_that_are_asked_for(scripts, data):
    module, tower = scripts("data"), scripts("tower")
    examples = module.load_split(data, "train")[:3]
    batch = tower.collate_names(examples)
    red, triangle = tower.NAMES[1].index("red"), tower.NAMES[0].index("triangle")
    assert batch["labels"].tolist() == [[-100, red], [-100, red], [triangle, red]]
    model = scripts("model").make_model(module.make_tokenizer(examples))
    namer = tower.Namer(model.model.vision_tower)
    with torch.no_grad():
        patches = model.model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:].mean(1)
        shapes, colors = (head(patches).log_softmax(-1) for head in namer.heads)
        expected = -(colors[:, red].sum() + shapes[2, triangle]) / 4
        torch.testing.assert_close(namer(**batch)["loss"], expected)
        assert namer(batch["pixel_values"], torch.full((3, 2), -100))["loss"] == 0


def test_questions_about_colors_have_no_shape_in_question_or_answer(scripts):
    module = scripts("data")
    example = module.Example(torch.zeros(3, 64, 64), [*ASKED, ("is there a red shape?", "yes")])
    (kept,) = module.color_questions([example, module.Example(example.pixels, ASKED[1:])])
    assert kept.questions == [ASKED[0], ("is there a red shape?", "yes")]


def test_the_base_is_trained_in_three_parts(scripts, data, tmp_path):
    train = scripts("train_base")
    train.main(data, 1, 1, 1, batch_size=4, learning_rate=1e-3, work=tmp_path, results=tmp_path)
    record = json.loads((tmp_path / "base.json").read_text())
    assert record["steps"] == {"tower": 1, "colors": 2, "all": 2}
    assert not record["resumed"]
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    test, tokenizer = (
        scripts("data").load_split(data, "test"),
        scripts("runs").Study(data, tmp_path / "base", 1).tokenizer,
    )
    assert scripts("accuracy").measure_accuracy(model, test, tokenizer) == record["accuracy"]


def test_the_control_is_trained_and_not_pruned(scripts, data, base):
    study, plan = scripts("runs").Study(data, base, steps=1), scripts("plan")
    (control,) = {run for run in plan.plan() if run.method == plan.CONTROL and run.seed == 0}
    pruned, report = study.prune(control)
    assert all(torch.equal(value, study.dense.state_dict()[name]) for name, value in pruned.state_dict().items())
    assert {row.modality for row in report.modules} == {"vision", "language"}
    assert study.run(control)["sparsity"] < 0.01


def test_plugins_by_what_they_merge(scripts, data, base, tmp_path, monkeypatch):
    plugins = scripts("plugins")
    monkeypatch.setattr(plugins, "RATIOS", (4,))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "base").symlink_to(base)
    few = {"steps": 1, "restoration_steps": 1, "questions": 5, "rounds": 2}
    plugins.main(data, **few, speed=False, work=tmp_path / "work", results=tmp_path)
    records = [json.loads(file.read_text()) for file in tmp_path.glob("plugin-*.json")]
    assert {record["merges"] for record in records} == {*plugins.MERGED, plugins.RESTORED}
    assert all(len(record["rows"]) == 2 and record["questions"] == 5 for record in records)
    flops = {record["merges"]: record["rows"][1]["flops"] / record["rows"][0]["flops"] for record in records}
    assert flops["all three"] < min(flops["image tokens"], flops["the vision tower's patches"]) < 1
    zeros = {record["merges"]: record["zeros"] for record in records}
    assert zeros[plugins.RESTORED] > 0.3 > zeros["all three"]


def test_single_questions_get_the_answers_of_packed_ones(scripts, data, base):
    study = scripts("runs").Study(data, base, steps=1)
    packed = scripts("accuracy").measure_accuracy(study.dense, study.test, study.tokenizer)
    assert scripts("plugins").Plugins(study, steps=1, questions=9).accuracy(study.dense) == packed
