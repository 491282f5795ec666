"""Every place where petune leans on something of another library that is not public, each with a check."""
