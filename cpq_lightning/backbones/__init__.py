"""Networks by name: timm's, and two that timm lacks. May import nn and below."""
