"""The parts of ``tools/model_cards.py``: tables, cards, pictures and metafiles, from zoo and benchmarks."""
