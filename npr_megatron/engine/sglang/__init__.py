"""NPR Engine on SGLang, by its official plugin seams."""
