"""The forms in which a model lies on disk: each opens as a `Source`, or writes one, or both."""
