"""How a picture is made where nobody says it. Apart from what makes it, so that a command's help can
name these at once."""

NUM_INFERENCE_STEPS = 50
GUIDANCE = 7.5  # as most programs take it
