"""Who owns which page, and where its bytes lie: integers only, no device."""
