"""The code of the experiments."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import checkpoint
from plumbing.cli import UsageError
from pocket import shapes
from tests.common import command, same_checkpoint


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
    sizes = {name: ways["C+B+A"]["all"]["of"] for name, ways in report.items() if "held" in name}
    assert sizes == {"held out": 4, "held out: a pair": 1, "held out: an object alone": 2,
                     "held out: an object in a pair": 1}
    assert len(report["wrong"]) == sum(
        rows["all"]["of"] - rows["all"]["right"]
        for rows in (report["seen"]["C+B+A"], report["held out"]["C+B+A"]))
    assert "| C+B+A, other text in B |" in done.stdout and (tmp_path / "failures.png").exists()
    done = command("-m", "experiments.prompt_accuracy", "--n", 51, check=False)
    assert "a batch of one prompt" in done.stderr and "Traceback" not in done.stderr


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


def test_operations_are_counted():
    """By hand: a linear map, a depthwise convolution; three forward passes are a step's count."""
    from experiments import price
    assert price.forward_flops(lambda: torch.nn.Linear(5, 7), (3, 5)) == 2 * 3 * 5 * 7
    depthwise = price.forward_flops(lambda: torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
                                    (1, 8, 10, 10))
    assert depthwise == 2 * 8 * 9 * 100
    config = price.stage_c.PRESETS["paper"]
    small, large = (price.of_c(config, (side, side)) for side in (12, 24))
    assert 3.5 < large / small < 5, "four times the positions, and attention grows faster"


def test_why_a_backward_pass_is_not_counted():
    """torch counts the backward of a depthwise convolution many times too high: so 3 x forward."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        layer, x = torch.nn.Conv2d(64, 64, 3, padding=1, groups=64), torch.randn(1, 64, 8, 8)
        with FlopCounterMode(display=False) as counter:
            out = layer(x.requires_grad_())
            forward = counter.get_total_flops()
            out.sum().backward()
    backward = counter.get_total_flops() - forward
    assert backward > 10 * 2 * forward, (
        f"backward counts {backward / forward:.1f} forward passes, about 2 are right: if torch "
        "counts well now, experiments/price.py can use its count")


def test_plot_without_a_training_or_a_sampling(tmp_path):
    """`efficiency --parts recipe`, and `--parts sample`, have no bars: the picture is written."""
    from experiments import efficiency
    rows = {"128 px, batch 1": {"eager": {"images_per_second": 2.0}}}
    for name, entry in ("recipe", {"price": "a table"}), ("sample", {"sample": rows}):
        efficiency.plot({name: entry}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.mark.slow
def test_price_of_the_papers_recipe():
    """E.2 to E.4 in total: what a count by hand gave, and the samples that the phases add up to."""
    from experiments import price
    rows = price.paper()
    learns = {name: row[1] for name, row in rows.items()}
    assert learns["Stage C, E.3's network"] == pytest.approx(9.5e20, rel=0.01)
    assert learns["Stage C, released network"] == pytest.approx(2.71e21, rel=0.01)
    assert learns["Baseline LDM (E.4)"] == pytest.approx(9.1e20, rel=0.01)
    assert rows["Stage A (E.1)"][0] == 128_000_000
    assert rows["Stage B and compressor (E.2)"][0] == 272_384_000
    assert rows["Stage C, released network"][0] == 1_349_376_000
    text = price.report("pocket", {"C": {"eager": {"seconds": 1.8}}})
    assert "TFLOP" in text and "C, eager: 1.00 hours" in text, text     # 2,000 steps


def test_baseline_ldm():
    """E.4 at paper size has .895 B parameters, the paper says .99; pocket's learns and returns
    noise of the latent's shape, from every condition.
    """
    from experiments.baseline_ldm import LDM, PRESETS
    with torch.device("meta"):
        model = LDM(PRESETS["paper"])
        assert model(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 1024)).shape == (
            1, 4, 64, 64)
    assert sum(one.numel() for one in model.parameters()) == 894_649_616
    model = LDM(PRESETS["pocket"])
    torch.nn.init.normal_(model.clf[1].weight)             # zero at init: it would hide the rest
    x, t, text = torch.randn(2, 4, 32, 32), torch.rand(2), torch.randn(2, 24, 128)
    first = model(x, t, text)
    assert first.shape == x.shape
    assert not torch.allclose(first, model(x, t, text.flip(0))), "the text has no effect"
    first.square().mean().backward()
    silent = [name for name, one in model.named_parameters() if one.grad is None]
    assert not silent, f"no gradient reaches {silent}"


def test_baseline_resumes_exactly(drawings, tmp_path):
    """Two steps of a small baseline, and one step, a stop and one more: the same checkpoint."""
    from experiments import baseline_ldm
    config = dataclasses.replace(
        baseline_ldm.PRESETS["pocket"], widths=(16, 16), heads=(1, 2), down=(1, 1), up=(1, 1),
        steps=2, batch_size=4, save_every=1, log_every=1)
    for steps, out in (2, "one"), (1, "two"), (2, "two"):
        baseline_ldm.train(dataclasses.replace(config, steps=steps), drawings, tmp_path / out)
    same_checkpoint(tmp_path / "one/checkpoint.pt", tmp_path / "two/checkpoint.pt")
    last = json.loads((tmp_path / "two/log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["samples"] == 8 and last["skipped"] == 0


@pytest.mark.slow
def test_shares_of_a_budget_are_runs_of_their_own(drawings, tmp_path, monkeypatch):
    """A branch of the trunk is, to the bit, the run that its config trains from the first step; a
    second call trains nothing; a larger budget goes on with the trunk.
    """
    from experiments import baseline_ldm, equal_compute
    config = dataclasses.replace(
        baseline_ldm.PRESETS["pocket"], widths=(16, 16), heads=(1, 2), down=(1, 1), up=(1, 1),
        steps=8, cooldown=4, batch_size=4, warmup=1)
    monkeypatch.setattr(baseline_ldm, "draw", lambda *_, **__: torch.zeros(8, 3, 8, 8))
    equal_compute.train("ldm", config, drawings, tmp_path / "run")
    assert sorted(one.name for one in (tmp_path / "run").iterdir()) == [
        "000001", "000002", "000004", "000008", "trunk"]
    alone = dataclasses.replace(config, steps=4, cooldown=2)
    baseline_ldm.train(alone, drawings, tmp_path / "alone")
    branch = tmp_path / "run/000004/checkpoint.pt"
    same_checkpoint(tmp_path / "alone/checkpoint.pt", branch)
    before = branch.stat().st_mtime_ns
    equal_compute.train("ldm", config, tmp_path / "no drawings", tmp_path / "run")
    assert branch.stat().st_mtime_ns == before
    equal_compute.train("ldm", dataclasses.replace(config, steps=12, cooldown=6), drawings,
                        tmp_path / "run")
    assert equal_compute.taken(tmp_path / "run/trunk") == ("ldm", 6)
    assert equal_compute.taken(tmp_path / "run/000012") == ("ldm", 12)
    assert not (tmp_path / "run/000003").exists(), "its decay begins before the trunk's end"


def test_budget_of_operations(monkeypatch):
    """By hand: so many steps of so many pictures, three forward passes each; what is beside."""
    from experiments import equal_compute, price
    forward = price.of_baseline("pocket", 128)
    config = equal_compute.budget("ldm", tflop=3 * forward * 44 * 100 / 1e12)
    assert config.steps == 100 and config.cooldown == 35
    c = equal_compute.budget("c", seed=1)
    assert (c.steps, c.cooldown, c.seed) == (2000, 700, 1)
    ldm = equal_compute.budget("ldm")
    assert equal_compute.operations("ldm", ldm.steps * 44) == pytest.approx(
        equal_compute.operations("c", 2000 * 128), rel=3e-4)
    total = sum(sum(row[1:]) for row in price.pocket().values())
    assert equal_compute.before("c") + equal_compute.operations("c", 256_000) == total
    monkeypatch.setattr(checkpoint, "parts", lambda *_: [
        dict(command="python -m pocket.teach", steps=3000),
        *(dict(command="python stage_b.py", steps=steps) for steps in (11_000, 5_500))])
    longer = equal_compute.before("c", "b.pt") - equal_compute.before("c")
    assert longer == pytest.approx(price.pocket()["Stage B"][1] / 2), "half as many steps again"


@pytest.mark.slow
def test_equal_compute_command(drawings, tmp_path, monkeypatch, capsys):
    """Baseline and Stage C train for a budget, and the curve has a row for each way, kept once."""
    from experiments import baseline_ldm, equal_compute, study
    monkeypatch.setattr(equal_compute, "SHARES", (1,))
    monkeypatch.setattr(equal_compute, "PRESETS", {
        "ldm": dataclasses.replace(baseline_ldm.PRESETS["pocket"], batch_size=4),
        "c": dataclasses.replace(equal_compute.PRESETS["c"], batch_size=4)})
    for model in equal_compute.PRESETS:
        one = equal_compute.operations(model, 4) / 1e12
        equal_compute.main(["train", model, "--tflop", str(2 * one), "--data", str(drawings),
                            "--out", str(tmp_path / model)])
        assert equal_compute.taken(tmp_path / model / "000002") == (model, 2)
    for _ in range(2):
        equal_compute.main(["curve", str(tmp_path / "ldm"), str(tmp_path / "c"), "--n", "2",
                            "--tries", "1", "--results", str(tmp_path / "rows.jsonl"),
                            "--figure", str(tmp_path / "f.png")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(row["way"] for row in rows) == sorted(equal_compute.WAYS)
    measured = []
    monkeypatch.setattr(equal_compute, "measure", lambda *more: measured.append(more) or rows)
    for other in (["--weights", "runs/pocket"], ["--seed", "2"]):
        equal_compute.main(["curve", str(tmp_path / "c"), "--n", "2", "--results",
                            str(tmp_path / "rows.jsonl"), "--figure", str(tmp_path / "f.png"),
                            *other])
    assert len(measured) == 2, "rows with other weights or prompts were taken for these"
    assert all(row["steps"] == row["n"] == 2 and 0 <= row["right"] <= 2 for row in rows)
    for _ in range(2):                                         # the second has nothing to draw
        study.main(["draw", "--baseline", str(tmp_path / "ldm/000002"), "--scenes", "2",
                    "--out", str(tmp_path / "drawn")])
    assert Image.open(tmp_path / "drawn/00001.png").size == (128, 128)
    with pytest.raises(UsageError, match="expected at least 1,"):
        equal_compute.main(["train", "c", "--tflop", str(one / 9), "--data", str(drawings)])


def test_figure_of_equal_compute(tmp_path, capsys):
    """Rows that are kept make the figure without a run; a budget that nobody trained is named."""
    from experiments import equal_compute
    rows = [dict(way=way, run="r", seed=seed, steps=1, n=200, right=9 * n, tflop=n, guidance=4.0,
                 tflop_all=n + (250 if way[0] == "C" else 34))
            for way in equal_compute.WAYS for seed in (0, 1) for n in (1, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    equal_compute.main(["curve", "--results", str(tmp_path / "rows.jsonl"),
                        "--figure", str(tmp_path / "f.png")])
    assert (tmp_path / "f.png").stat().st_size > 10_000
    (tmp_path / "damaged.jsonl").write_text('{"run": "r"')
    for name, runs, words in (("none", [], "no results"), ("damaged", [], "found no JSON"),
                              ("none", [str(tmp_path)], "expected the --out of")):
        with pytest.raises(UsageError, match=words):
            equal_compute.main(["curve", *runs, "--results", str(tmp_path / f"{name}.jsonl")])


@pytest.mark.slow
def test_rivals_have_their_published_sizes():
    """diffusers' classes with the settings of SD 2.1 and SDXL: the published models' parameters."""
    from experiments import efficiency
    nets, vae = efficiency.rivals(torch.device("meta"))
    sizes = {name: sum(one.numel() for one in net.parameters()) for name, net in nets.items()}
    assert sizes == {"SD 2.1": 865_910_724, "SDXL": 2_567_463_684}
    assert sum(one.numel() for one in vae.parameters()) == 83_653_863


def test_small_decoder_sizes():
    """Appendix D: 3.9 M parameters, 24x24 -> 384 px; pocket: 3x3 -> 96 px."""
    from experiments.small_decoder import WIDTHS, small_decoder
    with torch.device("meta"):
        paper, pocket = (small_decoder(WIDTHS[name]) for name in ("paper", "pocket"))
        assert paper(torch.zeros(2, 16, 24, 24)).shape == (2, 3, 384, 384)
        assert pocket(torch.zeros(2, 16, 3, 3)).shape == (2, 3, 96, 96)
    assert sum(one.numel() for one in paper.parameters()) == 3_858_371


@pytest.mark.slow
def test_small_decoder_command(chain, drawings, tmp_path, capsys):
    """It learns, is kept, is trained anew for another number of steps, and writes figure, table."""
    from experiments import small_decoder

    def run(*arguments):
        small_decoder.main(["--weights", str(chain), "--data", str(drawings), "--batch-size", "8",
                            "--out", str(tmp_path), "--figure", str(tmp_path / "who.png"),
                            *arguments])
        return capsys.readouterr().out
    text = run("--steps", "3", "--n", "6")
    assert "| the drawings | 100.0" in text and "| C + small decoder | " in text, text
    before = (tmp_path / "decoder.pt").read_bytes()
    (tmp_path / "prompts.txt").write_text("a red star\na blue circle\n")
    text = run("--steps", "3", "--prompts", str(tmp_path / "prompts.txt"))
    assert (tmp_path / "decoder.pt").read_bytes() == before and "% right" not in text, text
    assert "trained anew" in run("--steps", "2", "--n", "6")
    assert "trained anew" in run("--steps", "2", "--n", "6", "--lr", "1e-3")
    (tmp_path / "prompts.txt").write_text("")
    with pytest.raises(UsageError, match="prompts.txt: empty"):
        run("--steps", "9", "--prompts", str(tmp_path / "prompts.txt"))


def test_classes_in_place_of_captions(chain, drawings, tmp_path, monkeypatch, capsys):
    """Stage C trains on class ids and draws from a checkpoint that names them; 0 is no caption."""
    import sample
    import stage_c
    from experiments import classes
    from plumbing import text
    from test_shapes import TINY_C
    for module in (text, stage_c):                     # `use` replaces these two: put them back
        monkeypatch.setattr(module, "text_encoder", module.text_encoder)
    classes.use()
    captions = ["a large red star above a blue circle", "Red star.", "a blue circle", ""]
    found = classes.Classes()(captions)
    assert found.shape == (4, 1, classes.WIDTH) and (found.sum(-1) == 1).all()
    same = [torch.equal(found[0], one) for one in found]
    assert same == [True, True, False, False], "the class is not colour and shape of the first"
    assert found[3, 0, 0] == 1, "the empty caption is not class 0"
    config = dataclasses.replace(TINY_C, text_encoder="classes", text_width=classes.WIDTH)
    stages = [chain / f"stage_{stage}/checkpoint.pt" for stage in "ab"]
    stage_c.train(config, drawings, tmp_path / "stage_c", *stages)
    loaded = sample.load_chain(*stages, tmp_path / "stage_c/checkpoint.pt")
    one, other = (sample.draw_latents(loaded, [prompt], [0], 128, 128, steps=2)
                  for prompt in ("red star", "blue circle"))
    assert one.shape == (1, 16, 3, 3) and not torch.equal(one, other), "the class changes nothing"
    sample.main(["red star", "--weights", str(tmp_path), "--stage-a", str(stages[0]), "--stage-b",
                 str(stages[1]), "--steps-c", "2", "--steps-b", "2", "--out", f"{tmp_path}/x.png"])


def test_plot(tmp_path):
    """Logs of several trainings become one picture; its legend says what differs."""
    from experiments import plot
    for lr in (0.1, 0.2):
        folder = tmp_path / f"{lr}/stage_c"
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text("".join(json.dumps(
            {"step": step, "mse_by_t": [lr / step, None, 1, 2]}) + "\n" for step in (1, 2)))
    paths = sorted(tmp_path.glob("*/stage_c/log.jsonl"))
    assert plot.legends(paths) == ["0.1", "0.2"], "without checkpoints: the folders that differ"
    for lr, path in zip((0.1, 0.2), paths):
        torch.save({"config": {"lr": lr, "width": 8}}, path.with_name("checkpoint.pt"))
    assert plot.legends(paths) == ["lr 0.1", "lr 0.2"]
    figure = plot.plot(paths, tmp_path / "curves.png")
    assert [list(line.get_ydata()) for line in figure.axes[0].lines] == [[0.1, 0.05], [0.2, 0.1]]
    assert len(figure.axes) == 4 and (tmp_path / "curves.png").stat().st_size > 1000
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\n')
    with pytest.raises(UsageError, match="log of Stage B or C"):
        plot.read(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "mse_by_t": 2}\n')
    with pytest.raises(UsageError, match="expected the log.jsonl of a training"):
        plot.read(tmp_path / "log.jsonl")
    with pytest.raises(UsageError, match="--out .*xyz"):
        plot.plot(paths, tmp_path / "curves.xyz")
    paths[0].with_name("checkpoint.pt").write_text("junk")
    with pytest.raises(UsageError, match="0.1/stage_c/checkpoint.pt: expected the checkpoint"):
        plot.plot(paths)


@pytest.mark.parametrize("arguments, said", [
    ("efficiency --parts recipes", "--parts: found recipes"),
    ("efficiency --parts recipe --out TMP", "efficiency.json: found no JSON"),
    ("start --weights pocket --data TMP --n 9", "--n 9: .* holds 1 images"),
    ("ablate_b train x test=0 out=TMP", "test=0: expected 1 or more"),
    ("ablate_b train x batch_size=0 out=TMP", "key=value: found batch_size 0"),
    ("ablate_b file pocket/stage_b.safetensors test=8 out=TMP", "test-8.pt: expected encoded"),
    ("predict --prompt x --dtype int8", "--dtype int8: expected float32"),
    ("predict --prompt x --height 128", "--height 128: expected both")])
def test_experiments_refuse(arguments, said, tmp_path, monkeypatch):
    """What an experiment cannot read or would ignore is one sentence."""
    for name in ("efficiency.json", "test-8.pt"):
        (tmp_path / name).write_text('{"a": ')
    Image.new("RGB", (128, 128)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("a caption")
    name, *rest = arguments.replace("TMP", str(tmp_path)).split()
    monkeypatch.setattr("sys.argv", [name, *rest])
    with pytest.raises(UsageError, match=said):
        importlib.import_module(f"experiments.{name}").main()


def test_interpolation_of_small_weights(tmp_path):
    """float16 weights and a checkpoint of them mix; networks of other heads do not."""
    from tools.interpolate import interpolate
    state = checkpoint.load_checkpoint("pocket/stage_c.safetensors", "C")
    heads = dict(state["config"], heads=2)
    for name, config in ("same", state["config"]), ("heads", heads):
        checkpoint.save_checkpoint(tmp_path / f"{name}.pt", dict(
            state, config=config, ema=checkpoint.copied(state["ema"])))
    interpolate("pocket/stage_c.safetensors", tmp_path / "same.pt", tmp_path / "out")
    found = checkpoint.load_checkpoint(tmp_path / "out/checkpoint.pt", "C")["ema"]
    for name, value in state["ema"].items():
        torch.testing.assert_close(found[name], value.float())
    with pytest.raises(UsageError, match="no model"):
        interpolate(tmp_path / "heads.pt", tmp_path / "same.pt", tmp_path / "other")


def test_lab_changes_what_it_names(monkeypatch):
    """Each change of experiments/lab.py is the formula that its docstring says."""
    import semantic_compressor
    import stage_c
    from experiments import lab
    from plumbing import text
    from test_shapes import TINY_C
    for owner, name in ((stage_c, "ab_to_eps"), (stage_c, "StageC"), (stage_c, "p2_weight"),
                        (stage_c, "alpha_bar"), (text.TextEncoder, "forward"),
                        (semantic_compressor.SemanticCompressor, "standardise")):
        monkeypatch.setattr(owner, name, getattr(owner, name))            # put back at the end
    x, t = torch.randn(2, 16, 3, 3), torch.tensor([0.2, 0.9])
    lab.min_snr()
    snr = stage_c.alpha_bar(t) / (1 - stage_c.alpha_bar(t))
    assert torch.allclose(stage_c.p2_weight(t), snr.clamp(max=5) / snr)
    lab.v()
    a_bar = stage_c.alpha_bar(t).view(-1, 1, 1, 1)
    found = stage_c.StageC(TINY_C)(x, t, torch.randn(2, 24, 128))
    assert torch.allclose(found, (1 - a_bar).sqrt() * x), "v_hat is not 0 at init"
    assert torch.equal(stage_c.ab_to_eps(x, x + 1, x + 2), x + 2), "the head eps is not B"
    lab.linear()
    assert stage_c.alpha_bar(torch.tensor([0.25, 1.0])).tolist() == pytest.approx([0.75, 1e-4])
    lab.four()
    net = semantic_compressor.SemanticCompressor(semantic_compressor.PRESETS["pocket"])
    assert torch.equal(net.standardise(x)[:, :4], x[:, :4]) and not net.standardise(x)[:, 4:].any()


def test_shuffled_captions(encoder, monkeypatch):
    """A shuffled caption has the same words, always in the same order, and mostly another one."""
    from experiments import lab
    monkeypatch.setattr(type(encoder), "tokens", lambda self, captions: seen.append(captions[0]))
    monkeypatch.setattr(type(encoder), "forward", lambda self, captions: self.tokens(captions))
    seen, caption = [], "a red star above a blue circle"
    lab.shuffled()
    for _ in range(2):
        encoder([caption])
    assert seen[0] == seen[1] != caption and sorted(seen[0].split()) == sorted(caption.split())
