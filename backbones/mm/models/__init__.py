"""Models, backbones and necks for mmengine."""
