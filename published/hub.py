"""Weights from Hugging Face's hub."""

import urllib.error
import urllib.request


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
