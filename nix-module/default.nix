# The module where there are no flakes: imports = [ ".../nix-module" ]. The package is that of
# `pkgs`, or built with the eBPF objects of a release:
#   services.spokeguard.package = pkgs.callPackage ".../nix-module/package.nix" { ebpfObjects = ./objects; };
import ./module.nix
