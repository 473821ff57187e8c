# The module where there are no flakes: imports = [ ".../nix-module" ]. The package is that of
# `pkgs`, or built with the four eBPF objects of an earlier build of the same source (releases have
# none). Cargo leaves them in target/release/build/spokeguard-*/out, the same for every architecture.
#   services.spokeguard.package = pkgs.callPackage ".../nix-module/package.nix" { ebpfObjects = ./objects; };
import ./module.nix
