"""The tag language on token ids: grammar, parser, renderer, score, execution graph. No torch."""
