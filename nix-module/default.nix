# The module with its package, where there are no flakes: imports = [ ".../nix-module" ];
{ lib, pkgs, ... }:
{
  imports = [ ./module.nix ];
  services.spokeguard.package = lib.mkDefault (pkgs.spokeguard or (pkgs.callPackage ./package.nix { }));
}
