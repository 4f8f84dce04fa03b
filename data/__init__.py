"""The bundled model and sample prompts: see README.md in this folder of the source."""
