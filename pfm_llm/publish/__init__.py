"""The shared adapter as an artefact: exported, checked, signed, pushed, pulled, rolled back."""
