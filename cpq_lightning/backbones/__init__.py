"""Networks by name: all of timm's, and two for images of 32 x 32 pixels that timm lacks."""
