"""How weights reach SGLang's ranks, whole and proven."""
