"""Hugging Face's hub, and where published weights lie in a folder."""

import urllib.error
import urllib.request
from pathlib import Path

from plumbing.cli import UsageError

FOLDERS = dict(a="wuerstchen/vqgan", b="wuerstchen/decoder", c="wuerstchen-prior/prior",
               compressor="EfficientNetEncoder", text_b="wuerstchen/text_encoder",
               text_c="wuerstchen-prior/text_encoder")       # of warp-ai, as diffusers reads them
LAYOUTS = (                                                  # as in sample.find
    FOLDERS,
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c_finetune_interpolation.pt"),    # official (dome272)
    dict(a="vqgan_f4_v1_500k.pt", b="model_v2_stage_b.pt", compressor="model_v2_stage_b.pt",
         c="model_v2_stage_c.pt"))


def download():
    """The published weights (Würstchen v2) from the hub: {"a": path, …}. About 12.5 GB, once.

    Raises UsageError if something is neither in the hub's cache nor can be downloaded.
    """
    import huggingface_hub
    patterns = ["*/*.json", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
    roots = {}
    for name in ("wuerstchen", "wuerstchen-prior"):
        try:
            check_hub()
            roots[name] = huggingface_hub.snapshot_download(
                f"warp-ai/{name}", allow_patterns=patterns)
        except (OSError, ValueError) as offline:                          # HfHubHTTPError is one
            try:
                roots[name] = huggingface_hub.snapshot_download(
                    f"warp-ai/{name}", allow_patterns=patterns, local_files_only=True)
            except (OSError, ValueError):
                raise UsageError(
                    f"--weights released: not all of warp-ai/{name} is in the hub's cache, and it "
                    f"cannot be downloaded ({str(offline).splitlines()[0]}); go online once, or "
                    "put decoder/, vqgan/, text_encoder/ and tokenizer/ of warp-ai/wuerstchen into "
                    "DIR/wuerstchen, prior/, text_encoder/ and tokenizer/ of "
                    "warp-ai/wuerstchen-prior into DIR/wuerstchen-prior and give --weights DIR"
                ) from None
    parts = {part: name.split("/") for part, name in FOLDERS.items() if "/" in name}
    return {part: Path(roots[repository]) / folder for part, (repository, folder) in parts.items()}


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
    import huggingface_hub
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    config = get_pretrained_cfg(model, tag)
    for file in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        found = huggingface_hub.try_to_load_from_cache(config["hf_hub"].strip("/"), file)
        if isinstance(found, str):
            return found
    check_hub()
    return download_pretrained(config)
