"""The items of a catalogue as a model reads them: vectors of their texts, and trunk states."""
