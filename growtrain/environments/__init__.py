"""The worlds that a policy acts in: Atari through ALE's own vector environment, and continuous control."""
