"""Records turns, for `cachewise analyze` and `cachewise replay` (docs/recording.md)."""
