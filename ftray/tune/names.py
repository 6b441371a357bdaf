"""What somebody may have meant by a name that is not there."""

import difflib


def nearest(name: str, known: list[str]) -> str:
    """The remedy for an unknown name: the nearest known ones."""
    near = [other for other in known if _is_short_for(name, other)]
    near += [other for other in difflib.get_close_matches(name, known, n=3, cutoff=0.5) if other not in near]
    # A path is often right but for its section.
    near = near or [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2]]
    if not near:
        return f"known: {', '.join(known)}"
    return "did you mean " + " or ".join(f"`{item}`" for item in near[:3]) + "?"


def _is_short_for(name: str, other: str) -> bool:
    """True for `optim.lr` and `optim.learning_rate`, for `adapt.rank` and `adapt.r`."""
    (section, _, leaf), (other_section, _, other_leaf) = name.rpartition("."), other.rpartition(".")
    if section != other_section or not leaf:
        return False
    initials = "".join(word[:1] for word in other_leaf.split("_"))
    return leaf == initials or other_leaf == leaf[:1]
