"""How long a document may be."""

from typing import Any

# Their rotary factors depend on the longest row of the batch beyond the original length, so one document
# would change another's logits; within it they do not.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def max_positions(config: Any) -> int:
    """Most tokens of one document that a model takes, whatever else is in the batch."""
    text = config.get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        if part.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            original = part.get("original_max_position_embeddings")
            original = original or getattr(text, "original_max_position_embeddings", None)
            limit = min(limit, int(original or limit))
    return limit
