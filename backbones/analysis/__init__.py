"""Operations of a model, and the hidden attention of its scans."""
