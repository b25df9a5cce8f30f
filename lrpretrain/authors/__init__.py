"""The command lines of GaLore's, GradNormLoRP's and LORO's pretraining scripts, on this package."""
