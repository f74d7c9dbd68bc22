"""What an error of the Hub means, in a sentence that says what to do; for downloads and uploads."""

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what a call of huggingface_hub raises where the Hub or the way to it is at fault; 1.x and 2.x alike.

    An error of the HTTP library (httpx, or httpx2 in 2.x) that is no answer of the Hub comes as it is; the Hub's
    own are of its class and OSError.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    return *HfHubHTTPError.__bases__, HFValidationError


def explained(error: Exception, name: str, revision: str | None = None) -> str:
    """Return what `error`, one of `hub_errors`, says of the repository `name`, without the Hub's own many lines.

    A failed look into the cache is told by what kept the Hub from being asked.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        if not isinstance(error.__cause__, Exception):
            return f"{name} is not in the cache, and the Hub may not be asked (HF_HUB_OFFLINE)."
        return f"{explained(error.__cause__, name, revision)} The cache does not have it either."
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither an existing folder nor a Hub name (owner/model): {first_line(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"The Hub may not be asked for {name} (HF_HUB_OFFLINE)."
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms on its Hub page, then {LOGIN}."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"The Hub has no model {name!r} that you may read. Check the name; if it is private, {LOGIN}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the Hub."
    if isinstance(error, errors.HfHubHTTPError):
        return answered(error.response.status_code, name, first_line(error))
    if isinstance(error, OSError):
        return f"{name}: {first_line(error)}"
    return f"The Hub cannot be reached for {name} ({type(error).__name__}); look at the network, and try again."


def answered(status: int, name: str, text: str) -> str:
    """Return what an HTTP status of the Hub means for `name`."""
    if status == 401:
        return f"The Hub does not know the access token that it was sent for {name}; {LOGIN}."
    if status == 403:
        return f"The access token may not do this with {name}: use one of a member, with the right to write."
    if status == 404:
        return f"The Hub lists a file of {name} that it does not have (404); try again, or another revision."
    if status == 412:
        return f"{name} was changed while it was written to; try again."
    if status == 429:
        return f"The Hub takes no more requests for now (429), so {name} has to wait; try again in some minutes."
    if status >= 500:
        return f"The Hub is out of order ({status}), so {name} has to wait; try again later."
    return f"{name}: the Hub refused with {status}: {text}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; the Hub's run over many."""
    return str(error).strip().partition("\n")[0]
