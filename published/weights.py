"""Published weights, read as a checkpoint of ours and written back.

    a folder           config.json and diffusion_pytorch_model.safetensors, as diffusers writes them
                       (or .bin, of float16, or in several files)
    an official .pt    of dome272/Wuerstchen: weights alone, some under names of their own

Both hold the networks of the stage files, whose attribute names are those of the folders. The
fields of our Configs stand here as strings: this file imports no stage, and plumbing/checkpoint.py
imports it only when it is given such a file.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from plumbing.checkpoint import UNREADABLE, read_tensors
from plumbing.cli import UsageError
from published import hub

CLASSES = {"A": "PaellaVQModel", "B": "WuerstchenDiffNeXt", "C": "WuerstchenPrior",
           "compressor": "EfficientNetEncoder"}
FIELDS = {                      # entries of config.json -> fields of our Config with the same value
    "A": dict(bottleneck_blocks="decoder_blocks", latent_channels="latent_channels",
              num_vq_embeddings="codebook_size", scale_factor="latent_std"),
    "B": dict(c_in="latent_channels", c_r="timestep_width", patch_size="patch_size",
              c_cond="cond_width", clip_embd="text_width", effnet_embd="sem_channels",
              dropout="dropout", c_hidden="widths", blocks="blocks"),
    "C": dict(c_in="latent_channels", c="width", depth="depth", nhead="heads",
              c_cond="text_width", c_r="timestep_width", dropout="dropout"),
    "compressor": dict(c_latent="latent_channels", effnet="backbone",
                       latent_mean="latent_mean", latent_std="latent_std"),   # if we wrote it
}


# ---- reading -------------------------------------------------------------------------------------

def checkpoint(stage, config, tensors, compressor=None):
    """Theirs in the form of plumbing/checkpoint.py; its config has only what differs from the
    preset `released`.
    """
    if stage == "compressor":
        return dict(stage=stage, published=True, compressor_config=config, compressor_ema=tensors)
    config = dict(config, image_size=1024) if stage == "C" else config    # the last phase of E.3
    return dict(stage=stage, published=True, config=config, model=tensors, ema=tensors,
                compressor_config={}, compressor_ema=compressor or {})


def read_folder(folder, stage):
    """A folder in diffusers' layout, or the word "released" -> a checkpoint of ours. Where Stage
    B's folder has EfficientNetEncoder/ near it, that compressor is in the checkpoint, too.

    stage: "A", "B", "C", "compressor". Raises UsageError: files missing or damaged, another class,
    or a network that is not built here.
    """
    word = str(folder) == "released"
    near = folder if word else folder.parent.parent / "EfficientNetEncoder"
    beside = folder if word else folder.parent / "text_encoder"
    folder = hub.released(stage) if word else folder
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        found = theirs.get("_class_name")
        tensors = folder_tensors(folder, "diffusion_pytorch_model", "diffusion_pytorch_model")
    except UNREADABLE as error:
        raise UsageError(f"{folder}: expected a folder in diffusers' layout, config.json and "
                         f"diffusion_pytorch_model.safetensors ({error})") from None
    has = word or near.is_dir()
    if stage == "compressor" and found == CLASSES["B"] and has:
        return read_folder(near, stage)
    if found != CLASSES[stage]:
        raise UsageError(f"{folder}: found a {found}, expected {CLASSES[stage]}")
    compressor = read_folder(near, "compressor")["compressor_ema"] if stage == "B" and has else None
    try:
        return dict(checkpoint(stage, to_ours(stage, theirs), tensors, compressor),
                    text_beside=str(beside) if word or beside.is_dir() else None)
    except KeyError as error:
        raise UsageError(f"{folder}/config.json: not a {found} that can be built here (it has no "
                         f"entry {error})") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}/config.json: not a {found} that can be built here "
                         f"({error})") from None


def folder_tensors(folder, safe, pickled):
    """The weights in a folder, in files called `safe` (.safetensors) or `pickled` (.bin, of torch).

    One file, or several that an index names; float16 where nothing else is there. Raises one of
    UNREADABLE.
    """
    folder, tried = Path(folder), []
    for name, suffix in ((safe, "safetensors"), (pickled, "bin")):
        for variant in ("", ".fp16"):
            files = [f"{name}{variant}.{suffix}"]
            index = f"{name}.{suffix}.index{variant}.json"
            if (folder / index).is_file():
                named = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                files = sorted(set(named.values()))
            if (folder / files[0]).is_file():
                return {key: value for file in files
                        for key, value in read_tensors(folder / file).items()}
            tried += files
    raise FileNotFoundError(f"there is no {', '.join(tried)}")


def to_ours(stage, theirs):
    """config.json -> fields of our Config; a missing entry is as in `released`, which is diffusers'
    default, too, but for embed_dim and nhead. ValueError: a network that our stage cannot build.
    """
    ours = {mine: tuple(theirs[name]) if isinstance(theirs[name], list) else theirs[name]
            for name, mine in FIELDS[stage].items() if name in theirs}
    if stage == "A":
        ours["widths"] = (theirs["embed_dim"] // 2, theirs["embed_dim"])
    if stage == "B":
        ours["heads"] = tuple(max(0, n) for n in theirs["nhead"])
        if isinstance(ours.get("dropout"), tuple):       # theirs may have one for each level
            if len(set(ours["dropout"])) > 1:
                raise ValueError(f"dropout is {theirs['dropout']}, expected one for all levels")
            ours["dropout"] = ours["dropout"][0]
    if ours.get("timestep_width", 4) not in range(4, 2 ** 31, 2):        # sines and cosines
        raise ValueError(f"c_r is {theirs['c_r']}, expected an even number from 4")
    for name, value in implied(stage, ours).items():
        if theirs.get(name, value) != value:
            raise ValueError(f"{name} is {theirs[name]}, expected {value}")
    return ours


def implied(stage, ours):
    """Entries of config.json that are the same in every network of ours, or follow from others."""
    if stage == "A":
        return dict(in_channels=3, out_channels=3, levels=2, up_down_scale_factor=2)
    if stage == "B":
        return dict(kernel_size=3, c_out=ours.get("latent_channels", 4),
                    level_config=["CTA" if n else "CT" for n in ours["heads"]],
                    inject_effnet=[n > 0 for n in ours["heads"]])
    return {}


def read_official(state, stage):
    """The content of an official .pt file -> a checkpoint of ours, with the names of the folders.

    That of Stage B has the compressor, too.
    """
    if stage == "compressor":
        return checkpoint(stage, {}, state.get("effnet_state_dict", {}))
    weights = renamed(state.get("ema_state_dict") or state["state_dict"])
    return checkpoint(stage, {}, weights, state.get("effnet_state_dict"))


OFFICIAL_NAMES = {"vquantizer.codebook.": "vquantizer.embedding.",
                  "attention.attn.out_proj.": "attention.to_out.0.",
                  "attention.attn.in_proj_weight": ("to_q.weight", "to_k.weight", "to_v.weight"),
                  "attention.attn.in_proj_bias": ("to_q.bias", "to_k.bias", "to_v.bias")}


def renamed(tensors):
    """Weights by the names of the official .pt files -> by those of the diffusers folders."""
    out = {}
    for name, value in tensors.items():
        for theirs, ours in OFFICIAL_NAMES.items():
            if theirs in name and isinstance(ours, tuple):        # q, k, v are one matrix there
                start = name.partition("attn.")[0]
                out.update(zip([start + one for one in ours], value.chunk(3)))
                break
            name = name.replace(theirs, ours if isinstance(ours, str) else theirs)
        else:
            out[name] = value
    return out


# ---- writing -------------------------------------------------------------------------------------

def to_diffusers(stage, config, tensors):
    """Our Config and weights -> (config.json, tensors) of diffusers' class.

    UsageError where diffusers has no such network.
    """
    ours, tensors = vars(config), dict(tensors)
    theirs = {"_class_name": CLASSES[stage], **implied(stage, ours)}
    for name, mine in FIELDS[stage].items():
        theirs[name] = list(ours[mine]) if isinstance(ours[mine], tuple) else ours[mine]
    if stage == "A":
        theirs["embed_dim"] = config.widths[1]
        if 2 * config.widths[0] != config.widths[1]:
            raise UsageError(f"diffusers has no Stage A of widths {config.widths}, only (c, 2 c)")
        # diffusers knows a scale of the latents but no mean. So the mean moves into the weights on
        # both sides of them: the biases of the last norm before and of the convolution after them,
        # and the codes.
        first = tensors["up_blocks.0.0.weight"].sum((1, 2, 3))            # (c1,)
        tensors["up_blocks.0.0.bias"] = tensors["up_blocks.0.0.bias"] + first * config.latent_mean
        for name in ("down_blocks.3.1.bias", "vquantizer.embedding.weight"):
            tensors[name] = tensors[name] - config.latent_mean
    if stage == "B":
        theirs["nhead"] = [n or -1 for n in config.heads]
        if config.attend_to_sem or config.prediction != "released":
            raise UsageError("diffusers' Stage B does not attend to the compressor's latents and "
                             "has the released head; only one trained with --preset released can "
                             "be exported")
    if stage == "compressor":
        theirs["c_cond"] = tensors["mapper.0.weight"].shape[1]
        if not config.affine:                  # there the last norm has a scale and a shift
            tensors["mapper.1.weight"] = torch.ones(config.latent_channels)
            tensors["mapper.1.bias"] = torch.zeros(config.latent_channels)
    return theirs, tensors


def write_folder(folder, theirs, tensors):
    """Write what read_folder and diffusers' from_pretrained read."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    save_file(tensors, Path(folder) / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (Path(folder) / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")
