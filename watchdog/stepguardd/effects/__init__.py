"""Commands turned into acts. Each effect is an *ensure*: it looks at the world, then does what is missing."""
