"""UniAlignment: one diffusion transformer that generates, understands, edits and perceives images."""
