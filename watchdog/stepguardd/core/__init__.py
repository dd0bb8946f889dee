"""The pure core: `decide(state, event, now) -> (state, commands)`. No clock, I/O, randomness or logging."""
