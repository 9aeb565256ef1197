"""What runs inside SGLang's schedulers: our plugin."""
