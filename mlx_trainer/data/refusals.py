"""What is said of a source's rows when its store is opened: which of them cannot be used, and when that is too much."""

import logging

from mlx_trainer.data.encoding.encoder import SampleEncoder
from mlx_trainer.data.samples.conversation import DataError
from mlx_trainer.data.store.recipe import Recipe
from mlx_trainer.data.store.store import NOTES, TokenStore

MAX_BAD_SHARE = 0.05

logger = logging.getLogger("mlx_trainer.data")


def refuse_unusable(store: TokenStore, recipe: Recipe, max_bad_share: float) -> None:
    """Raise DataError where too many rows are bad, one is longer than it may be, or none can be trained."""
    facts, most = store.facts, recipe.max_seq_length
    bad, dropped = facts.counts.get("bad", 0), facts.counts.get("dropped", 0)
    if bad > max_bad_share * facts.total:
        raise DataError(
            f"{store.source}: {bad:,} of {facts.total:,} rows cannot be used, more than {max_bad_share:.0%}. "
            f"Repair them or take them out:{listed(store, 'bad')}"
        )
    if recipe.truncation == "error" and dropped:
        raise DataError(
            f"{store.source}: {dropped:,} rows are longer than max_seq_length={most}. Raise max_seq_length, shorten "
            f'them, or choose another truncation than "error":{listed(store, "dropped")}'
        )
    if facts.rows == 0:
        raise DataError(
            f"No row of {store.source} has a trained token within max_seq_length={most}: the prompts alone are "
            f"longer. Raise max_seq_length (the longest row has {max(facts.lengths):,} tokens) or shorten them."
        )


def listed(store: TokenStore, kind: str) -> str:
    """The first notes of a kind, a line each, and how many more there are."""
    told, count = store.facts.told[kind], store.facts.counts[kind]
    lines = "".join(f"\n  {store.source}:{line}: {reason}" for line, reason in told)
    more = f"\n  and {count - len(told):,} more, all of them in {store.folder / NOTES}" if count > len(told) else ""
    return lines + more


def tell_notes(store: TokenStore, recipe: Recipe) -> None:
    """Log the formats of the rows, and warn of bad and dropped ones and of texts that spell control tokens."""
    formats = ", ".join(f"{count:,} {name} rows" for name, count in store.facts.formats.items())
    logger.info("%s: %s", store.source, formats or "no row")
    tell_kind(store, "bad", "skipped a bad row")
    why = "which are not to be cut" if recipe.truncation == "drop" else "no trained token within"
    tell_kind(store, "dropped", f"dropped a row with {why} max_seq_length={recipe.max_seq_length}")
    if texts := store.facts.counts.get("control"):
        line, token = store.facts.told["control"][0]
        logger.warning(
            "%s: %d text rows spell control tokens, first %s:%d with %s. They are read as plain text; "
            "give chats as messages rows to have control tokens written",
            *(store.source, texts, store.source, line, token),
        )


def tell_kind(store: TokenStore, kind: str, what: str) -> None:
    """Warn of the first rows of a kind one by one, and of the others by their number."""
    told, count = store.facts.told.get(kind, []), store.facts.counts.get(kind, 0)
    for line, reason in told:
        logger.warning("%s: %s: %s:%d: %s", store.source, what, store.source, line, reason)
    if count > len(told):
        more = count - len(told)
        logger.warning("%s: %s: and %d more, %d in all, in %s", store.source, what, more, count, store.folder / NOTES)


def check_vocabulary(store: TokenStore, vocabulary_size: int, encoder: SampleEncoder) -> None:
    """Raise DataError at the first id that the model's embedding does not have; MLX would read past its end."""
    if store.facts.largest_id < vocabulary_size:
        return
    for index in range(store.facts.rows):
        row = store.row(index)
        id = int(row.ids.max())
        if id >= vocabulary_size:
            raise DataError(
                f"{row.source}: token {encoder.encoder.token(id)!r} has id {id}, but the model's "
                f"vocabulary ends at {vocabulary_size - 1}. Tokenizer and model do not belong together: load the "
                "model's own tokenizer, or enlarge its embedding."
            )
