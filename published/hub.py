"""Hugging Face's hub: the word `released`, and where published weights lie in a folder."""

import functools
import hashlib
import urllib.error
import urllib.request
from pathlib import Path

from plumbing import checkpoint
from plumbing.cli import UsageError

# of warp-ai, as diffusers reads them
FOLDERS = dict(a="wuerstchen/vqgan", b="wuerstchen/decoder", c="wuerstchen-prior/prior",
               compressor="EfficientNetEncoder",
               **{"clip-h": "wuerstchen/text_encoder",
                  "clip-bigg": "wuerstchen-prior/text_encoder"})
LAYOUTS = (                                                  # as in sample.find
    {part: folder for part, folder in FOLDERS.items() if "clip" not in part},
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c_finetune_interpolation.pt"),    # official (dome272)
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c.pt"))


def files(part):
    """A key of FOLDERS -> its repository on the hub and the names of its files there."""
    repository, _, inside = FOLDERS[part].partition("/")
    stem = "model" if "clip" in part else "diffusion_pytorch_model"
    names = [f"{inside}/{name}".lstrip("/") for name in ("config.json", f"{stem}.safetensors")]
    names += ["tokenizer/special_tokens_map.json"] * ("clip" in part)    # which token pads
    return f"warp-ai/{repository}", names


@functools.cache
def released(part):
    """The folder of a part of Würstchen v2 in the hub's cache, downloaded first if it is not there.

    part: a key of FOLDERS, or a stage as plumbing/checkpoint.py names it. Raises UsageError.
    """
    part = part.lower()
    repository, names = files(part)
    try:
        return fetch(repository, names)[0].parent
    except (OSError, ValueError) as error:                # HfHubHTTPError is an OSError
        raise UsageError(
            f"released: {FOLDERS[part]}/ of warp-ai is not in the hub's cache, and it cannot be "
            f"downloaded ({str(error).splitlines()[0]}); the same command goes on where it "
            f"stopped, or put it into DIR/{FOLDERS[part]} and give that folder") from None


def cached(*parts):
    """Whether all files of these parts are in the hub's cache."""
    return all(None not in find_cached(*files(part)) for part in parts)


def trained_on(c):
    """The checkpoint with the compressor that this Stage C was trained on, by its checksum: of the
    runs beside it, of pocket/, or "released" if the hub's cache has that; else None.
    """
    wanted = checkpoint.load_checkpoint(c, "C").get("compressor")
    runs = sorted(Path(c).parent.parent.glob("stage_b*/checkpoint.pt"))
    for path in (*runs, checkpoint.POCKET / "stage_b.safetensors", "released"):
        if path != "released" or cached("compressor"):
            state = checkpoint.load_checkpoint(path, "compressor")
            if checkpoint.checksum(checkpoint.copied(state["compressor_ema"])) == wanted:
                return path


def completed(weights, needed, given):
    """The paths `given`, by part, completed by the word: where --weights is it, and where there is
    a Stage C alone that was trained on the published compressor. Raises UsageError.
    """
    whole = dict.fromkeys((*needed, "compressor"), "released")
    c = Path(given.get("c") or Path(weights) / "stage_c/checkpoint.pt")
    if weights != "released":
        if (weights == "pocket" or "c" not in needed or "b" in given or not c.is_file()
                or any(Path(weights).glob("stage_b*")) or trained_on(c) != "released"):
            return given
        if not cached("a", "b", "clip-h"):
            raise UsageError(f"{c}: trained on the published compressor; `--stage-a released "
                             "--stage-b released` downloads the A and B that fit (5.8 GB)")
        whole["c"] = c
    if "b" in given:                                      # a compressor is that of its Stage B
        del whole["compressor"]
    return whole | given


def find_cached(repository, names):
    """-> the path of each file in the hub's cache, None where it is not there."""
    import huggingface_hub
    found = [huggingface_hub.try_to_load_from_cache(repository, name) for name in names]
    return [Path(path) if isinstance(path, str) else None for path in found]


def fetch(repository, names):
    """Files of a repository -> their paths in the hub's cache, downloaded if one is not there."""
    paths = find_cached(repository, names)
    if None in paths:
        check_hub()
        paths = [download(repository, name) for name in names]
    return paths


def download(repository, name):
    """One file into the hub's cache: first its name and size are printed. A stopped download goes
    on where it stopped; what comes is kept only if size and hash are those that the hub names.

    The hub's own client does neither: it begins anew in each process and compares the size alone.
    """
    import huggingface_hub as hub
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import WeakFileLock
    about = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name))
    blob = Path(hub.constants.HF_HUB_CACHE, repo_folder_name(
        repo_id=repository, repo_type="model"), "blobs", about.etag)
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(f"{about.etag}.part")
    with WeakFileLock(f"{part}.lock"):                    # one process downloads, the others wait
        if not blob.exists():
            here = part.stat().st_size if part.exists() else 0
            print(f"{repository}: downloading {name}, {about.size / 1e6:,.1f} MB"
                  + f", going on at {here / 1e6:,.1f} MB" * (here > 0), flush=True)
            if here < about.size:
                with open(part, "ab") as file:
                    http_get(about.location, file, resume_size=here, expected_size=about.size)
            if digest(part, about) != about.etag:
                part.unlink()
                raise ValueError(f"{name} is damaged: its hash is not the one that the hub names")
            part.rename(blob)
    return Path(hub.hf_hub_download(repository, name))    # names what is there


def digest(path, about):
    """The hash that the hub names a file by: sha256 of a large one, git's sha1 of a small one."""
    large = len(about.etag) == 64
    sum_of = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(2 ** 20):
            sum_of.update(chunk)
    return sum_of.hexdigest()


def check_hub():
    """FileNotFoundError with a sentence if Hugging Face's hub is out of reach."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError("they are not in the cache and HF_HUB_OFFLINE is set")
    try:  # the hub's own client retries for a minute before it says that there is no network
        urllib.request.urlopen(hub, timeout=10).close()
    except urllib.error.HTTPError:
        pass  # it answered, so it is there
    except OSError as error:
        raise FileNotFoundError(f"they are not in the cache and {hub} cannot be reached: "
                                f"{getattr(error, 'reason', error)}") from None


def open_clip_checkpoint(model, tag):
    """-> path of the checkpoint in the hub's cache, downloaded first if it is not there."""
    from huggingface_hub.utils import EntryNotFoundError
    from open_clip.pretrained import get_pretrained_cfg

    repository = get_pretrained_cfg(model, tag)["hf_hub"].strip("/")
    new, old = ["open_clip_model.safetensors"], ["open_clip_pytorch_model.bin"]
    try:
        paths = fetch(repository, new if None in find_cached(repository, old) else old)
    except EntryNotFoundError:
        paths = fetch(repository, old)
    return str(paths[0])
