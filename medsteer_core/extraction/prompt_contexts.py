"""Templates of a prompt, one a line, filled with a concept: averaged over several a direction depends less on words."""

from ..errors import MedSteerError

PLACE = "{concept}"
DEFAULT = """An endoscopic image of {concept}
A colonoscopy frame showing {concept}
A picture of {concept}"""


def filled(templates: str, concept: str) -> list[str]:
    """The prompts of each line of `templates` with `concept` in place of ``{concept}``; empty lines don't count.

    Raises MedSteerError where a line lacks the place, where two lines are the same, and where nothing is given.
    """
    concept = concept.strip()
    if not concept:
        raise MedSteerError("A concept is empty; a few words such as 'polyps' were expected.")
    lines = [line.strip() for line in templates.splitlines() if line.strip()]
    if not lines:
        raise MedSteerError(f"There are no templates; at least one line with {PLACE} was expected.")
    for number, line in enumerate(lines, 1):
        if PLACE not in line:
            raise MedSteerError(f"Template {number} is '{line}'; {PLACE} was expected in it, where the concept goes.")
        if line in lines[: number - 1]:
            raise MedSteerError(f"Template {number} is there twice: '{line}'. Remove one of the two lines.")
    return [line.replace(PLACE, concept) for line in lines]
