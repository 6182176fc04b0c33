"""What several tests of this folder use."""

TASK = 5
"""Of libero_spatial: the bowl starts on the ramekin; the scene has a cabinet and a stove, which are placed at reset."""
