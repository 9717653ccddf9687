"""What ``tools/model_cards.py`` writes: tables, cards, pictures and metafiles, from zoo and benchmarks."""
