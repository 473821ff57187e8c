{
  description = "spokeguard: holds a host to what its policy exposes, and proves it";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-26.05";
    # A compiler with the source of its library, which the eBPF programs need.
    rust-overlay.url = "github:oxalica/rust-overlay";
    rust-overlay.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs =
    {
      self,
      nixpkgs,
      rust-overlay,
    }:
    let
      systems = [
        "aarch64-linux"
        "x86_64-linux"
      ];
      each =
        make:
        nixpkgs.lib.genAttrs systems (
          system:
          let
            pkgs = import nixpkgs {
              inherit system;
              overlays = [ rust-overlay.overlays.default ];
            };
          in
          make {
            inherit pkgs system;
            toolchain = pkgs.rust-bin.stable."1.95.0".minimal.override { extensions = [ "rust-src" ]; };
            # That compiler's LLVM (`rustc -vV`); nixpkgs' own compiler may have an older one.
            bpf-linker = pkgs.bpf-linker.override { llvmPackagesForLinker = pkgs.llvmPackages_22; };
          }
        );
      module =
        { lib, pkgs, ... }:
        {
          imports = [ ./nix-module/module.nix ];
          services.spokeguard.package =
            lib.mkDefault
              self.packages.${pkgs.stdenv.hostPlatform.system}.default;
          services.spokeguard.checkPackage =
            lib.mkIf (!pkgs.stdenv.buildPlatform.canExecute pkgs.stdenv.hostPlatform)
              (lib.mkDefault (self.packages.${pkgs.stdenv.buildPlatform.system}.default or null));
        };
    in
    {
      packages = each (
        {
          pkgs,
          toolchain,
          bpf-linker,
          ...
        }:
        {
          default = pkgs.callPackage ./nix-module/package.nix { inherit bpf-linker toolchain; };
        }
      );

      overlays.default = final: _: {
        spokeguard = self.packages.${final.stdenv.hostPlatform.system}.default;
      };

      nixosModules.default = module;

      devShells = each (
        {
          pkgs,
          toolchain,
          bpf-linker,
          ...
        }:
        {
          default = pkgs.mkShell {
            packages = [
              (toolchain.override {
                extensions = [
                  "clippy"
                  "rust-src"
                  "rustfmt"
                ];
              })
              bpf-linker
              pkgs.iproute2
              pkgs.nftables
              pkgs.nixfmt-tree
              pkgs.nmap
              pkgs.wireguard-tools
            ];
          };
        }
      );

      checks = each (
        { pkgs, system, ... }:
        {
          package = self.packages.${system}.default;
          vm = import ./nix-module/vm-test.nix {
            inherit pkgs;
            spokeguard = module;
          };
        }
      );

      formatter = each ({ pkgs, ... }: pkgs.nixfmt-tree);
    };
}
