"""The code of the experiments."""

import json

import numpy as np
import pytest
import torch

from pocket import shapes
from tests.common import command


def drawn(scene, noise):
    from torchvision.transforms.functional import to_tensor
    picture = to_tensor(shapes.render(scene, 128))
    return picture + noise * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))


def test_checker_sees_what_is_drawn():
    """On true drawings, jittered and noised, at least 99 % of every attribute is judged right."""
    from experiments import prompt_accuracy as accuracy
    jobs = [job for split in ("train", "heldout") for job in accuracy.prompts(100, split, 3)]
    table = accuracy.tally([accuracy.compare(accuracy.look_at(drawn(scene, 0.05)), scene, caption)
                            for caption, scene in jobs])
    assert set(table) == set(accuracy.ATTRIBUTES)
    assert all(line["percent"] >= 99 and line["of"] > 15 for line in table.values()), table


@pytest.mark.slow
def test_checker_sees_what_is_wrong():
    """A swapped colour, shape, order, place or background and a third object are noticed: 99 %."""
    from experiments import prompt_accuracy as accuracy
    caught = {name: [] for name in ("colour", "shape", "relation", "place", "background", "count",
                                    "size")}
    for caption, scene in accuracy.prompts(120, "train", 4):
        first = scene["objects"][0]
        others = {name: [one for one in table if one != first[name]] for name, table in (
            ("colour", shapes.COLOURS), ("shape", shapes.SHAPES))}
        rng = np.random.RandomState(len(caption))
        wrong = {name: {**scene, "objects": [{**first, name: rng.choice(others[name])},
                                             *scene["objects"][1:]]} for name in others}
        ground = rng.choice([one for one in shapes.BACKGROUNDS if one != scene["background"]])
        wrong["background"] = {**scene, "background": ground}
        if scene["relation"]:
            places = [{key: thing[key] for key in ("x", "y", "radius", "size")}
                      for thing in scene["objects"]]
            wrong["relation"] = {**scene, "objects": [
                {**thing, **place} for thing, place in zip(scene["objects"], places[::-1])]}
            wrong["count"] = {**scene, "objects": scene["objects"][:1]}
        elif first["place"]:
            far = 0.8 if first["x"] < 0.5 else 0.2
            wrong["place"] = {**scene, "objects": [{**first, "x": far, "y": far, "radius": 0.12}]}
        size = "large" if first["size"] == "small" else "small"
        if len(scene["objects"]) == 1 and first["size"] in caption:
            radius = sum(shapes.SIZES[size]) / 2
            wrong["size"] = {**scene, "objects": [{**first, "radius": radius, "x": .5, "y": .5}]}
        for name, other in wrong.items():
            right = accuracy.compare(accuracy.look_at(drawn(other, 0.03)), scene, caption)
            if name in right:                          # the caption may not mention it
                caught[name].append(not right[name] and not right["all"])
    for name, votes in caught.items():
        assert len(votes) > 10 and np.mean(votes) >= 0.99, (name, len(votes), np.mean(votes))


@pytest.mark.slow
def test_prompt_accuracy_command(chain, tmp_path):
    """The study runs on any weights and writes its tables and the sheet of failures."""
    done = command("-m", "experiments.prompt_accuracy", "--weights", chain, "--n", 4,
                   "--steps-c", 2, "--steps-b", 2, "--out", tmp_path)
    report = json.loads((tmp_path / "accuracy.json").read_text())
    assert report["seen"]["the drawings"]["all"]["percent"] == 100
    assert report["held out"]["C+B+A"]["all"]["of"] == 4
    assert "| C+B+A, other text in B |" in done.stdout and (tmp_path / "failures.png").exists()


@pytest.mark.slow
def test_ablation_of_stage_b_command(tmp_path):
    """A variant trains, goes on where it stopped and is evaluated; another recipe is refused."""
    def train(*settings, **options):
        return command("-m", "experiments.ablate_b", "train", "tiny", "drawings=64", "test=8",
                       "log_every=1", "widths=[8,16]", "heads=[0,2]", "blocks=[1,1]",
                       f"out={tmp_path}", *settings, **options)
    train("steps=2")
    assert "at step 2" in train("steps=4").stdout
    refused = train("steps=4", "loss=x0", check=False)
    assert refused.returncode == 1 and "loss is x0, was v" in refused.stderr
    log, results = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
                    for name in ("tiny-s0/log.jsonl", "results.jsonl"))
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["steps"] for line in results] == [2, 4] and results[1]["x0 1"] > 0
    assert (tmp_path / "tiny-s0/sheet.png").exists()
